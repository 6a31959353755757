"""Fifty steps in torch (transformers and torch-optimi) and here: every loss within 1e-4."""

import functools

import jax
import numpy as np
import pytest

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.hf import hf_to_params
from modernbert_jax.packing import IGNORE_INDEX
from tests.parity_cases import hf_model
from train.common.optimizer import decay_mask
from train.common.sharding import make_mesh
from train.pretrain.config import Optimizer, Phase, TrainConfig
from train.pretrain.step import Trainer, TrainState

torch = pytest.importorskip("torch")
optimi = pytest.importorskip("optimi")

pytestmark = pytest.mark.optimized

STEPS, LENGTH, PLACES, DOCUMENTS = 50, 24, 10, 6
PEAK = 3e-3
PHASE = Phase(tokens=STEPS, learning_rate=PEAK, warmup_tokens=5, decay_tokens=20)


def start():
    """transformers' model before the first step."""
    return hf_model("ModernBertForMaskedLM", {"num_hidden_layers": 5}).train()


def documents(step):
    """[(ids, positions, labels)] of one step: the same for both sides; a Markov text to learn."""
    rng = np.random.default_rng((7, step))
    out = []
    for _ in range(DOCUMENTS):
        length = int(rng.integers(6, LENGTH + 1))
        ids = np.empty(length, np.int64)
        ids[0] = rng.integers(5, 97)
        for i in range(1, length):
            ids[i] = 5 + (ids[i - 1] * 7 + rng.integers(0, 3)) % 92
        positions = np.sort(rng.choice(length, max(1, length // 3), replace=False))
        labels = ids[positions].copy()
        masked = ids.copy()
        masked[positions] = 4
        out.append((masked, positions, labels))
    return out


@functools.cache
def torch_losses():
    """Each document a padded row of its own."""
    reference = start()
    decays = decay_mask(dict(reference.named_parameters()))
    named = dict(reference.named_parameters())
    optimizer = optimi.StableAdamW(
        [
            {"params": [p for k, p in named.items() if decays[k]], "weight_decay": 5e-4},
            {"params": [p for k, p in named.items() if not decays[k]], "weight_decay": 0.0},
        ],
        lr=PEAK, betas=(0.9, 0.98), eps=1e-6, decouple_lr=True, max_lr=PEAK,
        triton=False, foreach=False,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        ids = torch.full((DOCUMENTS, LENGTH), 3)
        mask = torch.zeros(DOCUMENTS, LENGTH, dtype=torch.long)
        labels = torch.full((DOCUMENTS, LENGTH), -100)
        for row, (tokens, positions, answers) in enumerate(documents(step)):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, positions] = torch.tensor(answers)
        loss = reference(ids, mask, labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = PHASE.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batch_of(step, packed, gradient_accumulation_steps):
    docs = documents(step)
    per_row = 2 if packed else 1
    rows = [docs[i : i + per_row] for i in range(0, DOCUMENTS, per_row)]
    L, P = LENGTH * per_row, PLACES * per_row
    arrays = {k: np.zeros((len(rows), L), np.int32) for k in ("input_ids", "segment_ids")}
    arrays |= {"predict_positions": np.zeros((len(rows), P), np.int32)}
    arrays |= {"labels": np.full((len(rows), P), IGNORE_INDEX, np.int32)}
    for r, row in enumerate(rows):
        end = used = 0
        for number, (tokens, positions, answers) in enumerate(row, start=1):
            n = len(positions)
            arrays["input_ids"][r, end : end + len(tokens)] = tokens
            arrays["segment_ids"][r, end : end + len(tokens)] = number
            arrays["predict_positions"][r, used : used + n] = positions + end
            arrays["labels"][r, used : used + n] = answers
            end, used = end + len(tokens), used + n
    return {k: v.reshape(gradient_accumulation_steps, -1, v.shape[-1]) for k, v in arrays.items()}


@pytest.mark.parametrize(
    "packed, gradient_accumulation_steps, scan",
    [
        (False, 1, False),
        (True, 1, False),
        pytest.param(True, 3, False, marks=pytest.mark.matrix),
        pytest.param(False, 2, True, marks=pytest.mark.matrix),
    ],
    ids=["unpacked", "packed", "packed-accumulated", "unpacked-accumulated-scanned"],
)
def test_fifty_steps(packed, gradient_accumulation_steps, scan):
    reference = start()
    config = ModernBertConfig.from_dict(reference.config.to_dict())
    tensors = {k: v.detach().numpy().copy() for k, v in reference.state_dict().items()}
    params = hf_to_params(ModernBertForMaskedLM, config, tensors)
    recipe = TrainConfig(optimizer=Optimizer(weight_decay=5e-4), loss_chunk=16, scan_layers=scan)
    trainer = Trainer(recipe, config, make_mesh(devices=jax.devices()[:1]))
    params = jax.tree.map(jax.numpy.asarray, params)
    state = TrainState(params, trainer.tx.init(params))
    ours = []
    for step in range(STEPS):
        batch = batch_of(step, packed, gradient_accumulation_steps)
        state, metrics = trainer.train_step(state, batch, PHASE.learning_rate_at(step), PEAK)
        ours.append(float(metrics["loss"]))
    theirs = torch_losses()
    assert theirs[0] - theirs[-1] > 0.2  # it did learn
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
