"""`pretrain --lora-rank`: adapters alone are trained, on any mesh, and exported, merged as well."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import modernbert_jax as mj
from modernbert_jax import lora
from modernbert_jax.checkpoint.orbax import load_orbax
from modernbert_jax.checkpoint.params import variables
from modernbert_jax.tokenizer import add_tokens
from modernbert_jax.weights import is_adapter
from train.common.optimizer import stable_adamw
from train.common.sharding import MeshShape, make_mesh
from train.corpora.synthetic import write_corpus
from train.pretrain import run as loop
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.setup import model_config_of, start_state
from train.pretrain.step import Trainer

PHASE = Phase("adapt", tokens=3_500, learning_rate=1e-2)
CONFIG = mj.ModernBertConfig.tiny(
    vocab_size=320, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, local_attention=8, pad_token_id=0, cls_token_id=1, bos_token_id=1,
    sep_token_id=2, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(small_tokenizer, tmp_path_factory):
    """The folder of a checkpoint, and a corpus."""
    folder = tmp_path_factory.mktemp("lora")
    model = mj.ModernBertForMaskedLM(CONFIG, rngs=nnx.Rngs(3))
    model.save_pretrained(folder / "start", tokenizer=small_tokenizer)
    write_corpus(folder / "notes", 40, seed=1)
    return folder


def settings(start, workdir="unused", **changes) -> TrainConfig:
    config = TrainConfig(
        model=CONFIG, phases=(PHASE,), corpus=(str(start / "notes"),), workdir=str(workdir),
        init_from=str(start / "start"), sequence_length=64, global_batch_size=8, eval_every=100,
        eval_sequences=8, checkpoint_every=3, keep_checkpoints=9, eval_fraction=0.1,
        mesh=MeshShape(data=1), lora_rank=2, lora_alpha=6.0, lora_targets=("Wqkv", "mlp.Wo"),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def batch_of(rng, shape=(2, 4, 24), count=5):
    """Micro-batches with two documents in a sequence, and labels at `count` positions."""
    ids = rng.integers(5, 320, shape).astype(np.int32)
    positions = np.sort(rng.permuted(np.tile(np.arange(24), (*shape[:2], 1)), axis=-1)[..., :count])
    return {
        "input_ids": ids,
        "segment_ids": np.broadcast_to(np.repeat([1, 2], [10, 14]), shape).astype(np.int32),
        "predict_positions": positions.astype(np.int32),
        "labels": rng.integers(5, 320, (*shape[:2], count)).astype(np.int32),
    }


@pytest.mark.parametrize(
    "mesh, scan",
    [
        (MeshShape(data=2, fsdp=2, tensor=2), False),
        (MeshShape(data=1, fsdp=2, sequence=2), True),
        pytest.param(MeshShape(data=1), False, marks=pytest.mark.matrix),
    ],
)
def test_steps_are_those_of_a_plain_loop(start, mesh, scan):
    """Losses and factors after three steps, against nnx's gradients of the library's own loss."""
    config = settings(start, mesh=mesh, gradient_accumulation_steps=2, scan_layers=scan)
    trainer = Trainer(config, CONFIG, make_mesh(mesh))
    state = start_state(config, trainer)
    model = mj.ModernBertForMaskedLM.from_pretrained(start / "start")
    lora.add_lora(model, 2, 6, ("Wqkv", "mlp.Wo"), rngs=nnx.Rngs(config.seed))
    before = {path: np.array(v.get_value()) for path, v in variables(model).items()}
    factors = variables(model, lora.LoRAParam)
    assert set(trainer.trained) == set(state.optimizer.mu) == set(factors) and len(factors) == 12
    for path, value in before.items():
        np.testing.assert_array_equal(state.params[path], value, err_msg=path)

    @nnx.jit
    def gradients(model, ids, segments, labels):
        loss = lambda m: m(ids, segment_ids=segments, labels=labels).loss  # noqa: E731
        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model)

    tx = stable_adamw(
        config.optimizer.b1, config.optimizer.b2, config.optimizer.eps,
        config.optimizer.weight_decay,
    )  # fmt: skip
    ours = {path: v.get_value() for path, v in factors.items()}
    moments, rng = tx.init(ours), np.random.default_rng(0)
    for rate in np.float32([1e-2, 5e-3, 1e-2]):
        batch = batch_of(rng)
        state, metrics = trainer.train_step(
            state, trainer.to_devices(batch), rate, np.float32(0.01)
        )
        flat = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
        labels = np.full(flat["input_ids"].shape, -100, np.int32)
        np.put_along_axis(labels, flat["predict_positions"], flat["labels"], axis=1)
        loss, grads = gradients(model, flat["input_ids"], flat["segment_ids"], labels)
        grads = {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(grads)}
        updates, moments = tx.update(
            grads, moments, ours, learning_rate=rate, max_learning_rate=np.float32(0.01)
        )
        ours = {path: ours[path] + updates[path] for path in ours}
        lora.attach(model, ours, 6 / 2)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for path, value in before.items():
        if path in ours:
            np.testing.assert_allclose(state.params[path], ours[path], atol=2e-4, err_msg=path)
            assert np.abs(state.params[path] - value).max() > 1e-3, path
        else:
            np.testing.assert_array_equal(state.params[path], value, err_msg=path)


@pytest.fixture(scope="module")
def finished(start):
    config = settings(start, start / "run")
    return config, loop.run(config)


def test_what_it_leaves_behind(start, finished):
    """The export is the start with the adapter, as this library and peft compute it."""
    config, _ = finished
    workdir = pathlib.Path(config.workdir)
    ids = np.random.default_rng(1).integers(5, 320, (2, 16))
    merged = mj.ModernBertForMaskedLM.from_pretrained(workdir / "export")(ids).logits
    model = mj.ModernBertForMaskedLM.from_pretrained(start / "start")
    plain = model(ids).logits
    lora.load_adapter(model, workdir / "adapter")
    np.testing.assert_allclose(model(ids).logits, merged, atol=2e-5)
    assert np.abs(plain - merged).max() > 0.01
    card = (workdir / "export" / "README.md").read_text()
    assert "LoRA of rank 2 and alpha 6 in Wqkv, mlp.Wo, merged into the weights" in card

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(start / "start")
    theirs = peft.PeftModel.from_pretrained(theirs, workdir / "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(ids)).logits, merged, atol=2e-5)


def test_resumes_bit_for_bit(start, finished, tmp_path, capsys):
    config, result = finished
    again = shutil.copytree(config.workdir, tmp_path / "again")
    first, *others = sorted((again / "checkpoints").iterdir())
    assert others
    for folder in others:
        shutil.rmtree(folder)
    resumed = loop.run(dataclasses.replace(config, workdir=str(again)))
    assert f"{first.name} (step 3)" in capsys.readouterr().out
    assert resumed["steps"] == result["steps"] > 3
    ours, theirs = (
        load_orbax(folder / "checkpoints" / f"{result['steps']:08d}", optimizer=True)
        for folder in (again, pathlib.Path(config.workdir))
    )
    assert ours["data"]["fingerprints"] == theirs["data"]["fingerprints"]
    assert all(is_adapter(path) for path in ours["optimizer"]["mu"])
    kept = mj.ModernBertForMaskedLM.from_pretrained(start / "start")
    for path, value in variables(kept).items():
        np.testing.assert_array_equal(ours["params"][path], value.get_value(), err_msg=path)


class TestRefused:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"init_from": None}, "lora_rank: expected init_from, whose weights stay"),
            ({"init_optimizer": True}, "without init_optimizer; got .* and True"),
            ({"lora_rank": None}, "lora_alpha, lora_targets: expected lora_rank as well"),
            ({"lora_rank": 0}, "rank: expected 1 to"),
        ],
    )
    def test_settings(self, start, changes, message):
        with pytest.raises(ValueError, match=message):
            settings(start, **changes).validate()

    def test_a_target_of_no_layer(self, start):
        with pytest.raises(ValueError, match="targets: expected some of .*, got 'query'"):
            Trainer(settings(start, lora_targets=("query",)), CONFIG, make_mesh(MeshShape(data=1)))

    def test_added_tokens(self, start):
        tokenizer = mj.AutoTokenizer.from_pretrained(start / "start")
        add_tokens(tokenizer, [f"word{i}" for i in range(30)])
        with pytest.raises(ValueError, match="lora_rank: expected the vocabulary of"):
            model_config_of(settings(start), tokenizer)

    def test_another_rank_when_it_is_resumed(self, finished):
        config = dataclasses.replace(finished[0], lora_rank=3)
        with pytest.raises(ValueError, match="another configuration: lora_rank was 2, is 3"):
            loop.run(config)

    def test_a_checkpoint_as_a_model(self, finished):
        folder = sorted((pathlib.Path(finished[0].workdir) / "checkpoints").iterdir())[-1]
        with pytest.raises(ValueError, match="LoRA adapters among them: of a training run, load"):
            mj.ModernBertForMaskedLM.from_pretrained(folder)


def test_memory_of_a_plan(start):
    """The moments are those of the adapters alone."""
    from train.plan.compile import abstract_arguments, state_bytes

    config = settings(start)
    trainer = Trainer(config, CONFIG, make_mesh(MeshShape(data=1)))
    factors = 4 * sum(np.prod(trainer.shapes[path].shape) for path in trainer.trained)
    sizes = state_bytes(trainer)
    assert sizes["moments"] == 2 * factors and sizes["parameters"] > 10 * factors
    state = abstract_arguments(trainer, PHASE)[0]
    assert set(state.optimizer.nu) == set(trainer.trained)
    assert jax.tree.structure(state.params) == jax.tree.structure(dict(trainer.shapes))
