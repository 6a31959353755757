"""The train step on one device of whatever kind is there, beside torch, in one process.

    python tests/benchmarks/train_step.py [--json FILE] [--sizes base large] [--lengths 1024 8192]
    python tests/benchmarks/train_step.py --quick        a tiny model in float32, for a CPU

Ours: train.pretrain.step with bf16 products, float32 weights, dropout 0.1 on the attention's output
and StableAdamW. torch: transformers' model with sdpa, compiled on GPUs, under bf16 autocast with
float32 weights, no dropout, fused AdamW. Both predict 30 % of the tokens and send only those
through the head. Documents: "full", each as long as a row; "packed", of exponential lengths with a
mean of 1,024 tokens (a quarter of a row where rows are shorter than 4,096), cut to a row; the JSON
has the mean of those drawn. We pack those into rows. torch, which has no packed sdpa, gets them
sorted by length in padded batches of as many places, summed into one update.

Tokens are counted without padding. MFU counts model FLOPs (train/common/flops.py) against the
device's peak. Before anything is timed both losses on the same weights and documents must agree. A
step begins at 98,304 tokens (large: 57,344), the reference's micro-batch on a GPU, and is halved
while it does not fit.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory as well
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM  # noqa: E402
from modernbert_jax.attention import check  # noqa: E402
from modernbert_jax.checkpoint.hf import hf_to_params  # noqa: E402
from modernbert_jax.checkpoint.params import flatten  # noqa: E402
from modernbert_jax.packing import IGNORE_INDEX, plan_rows  # noqa: E402
from train.common.flops import PEAK, mfu, model_flops  # noqa: E402
from train.common.sharding import batch_sharding, make_mesh  # noqa: E402
from train.pretrain.config import TrainConfig  # noqa: E402
from train.pretrain.masking import predicted_positions  # noqa: E402
from train.pretrain.step import REMAT, Trainer  # noqa: E402

HAS_TORCH = importlib.util.find_spec("torch") is not None  # without it only ours is timed
MASK_RATE, MEAN_DOCUMENT = 0.30, 1024
MICRO_TOKENS = {"base": 98_304, "large": 57_344, "tiny": 1024}


@dataclasses.dataclass(frozen=True)
class Document:
    """ids after masking; places and labels of what is predicted."""

    ids: np.ndarray
    places: np.ndarray
    labels: np.ndarray


Rows = list[list[Document]]  # the documents of each row


def make_rows(kind: str, rows: int, length: int, vocabulary: int) -> Rows:
    """Documents of random tokens: one a row, or some rows of the plan for many more documents."""
    rng = np.random.default_rng(0)
    lengths = [[length]] * rows
    if kind == "packed":
        drawn = rng.exponential(min(MEAN_DOCUMENT, length // 4), 400 * rows).astype(int)
        drawn = np.clip(drawn, 16, length)
        plan = plan_rows(drawn, length, (0,))
        lengths = [drawn[plan.row(r)].tolist() for r in range(rows)]

    def document(n: int) -> Document:
        ids = rng.integers(5, vocabulary, n)
        places = np.sort(rng.choice(n, max(1, round(MASK_RATE * n)), replace=False))
        labels = ids[places]
        ids[places] = 4
        return Document(ids, places, labels)

    return [[document(n) for n in row] for row in lengths]


def predicted(packed: Rows) -> int:
    """Positions that are predicted."""
    return sum(len(d.labels) for documents in packed for d in documents)


def our_batch(packed: Rows, length: int) -> dict[str, np.ndarray]:
    """One micro-batch, leaves [1, rows, ...]."""
    rows = len(packed)
    limit = predicted_positions(length, MASK_RATE)
    shapes = {"input_ids": length, "segment_ids": length, "predict_positions": limit}
    arrays = {name: np.zeros((1, rows, n), np.int32) for name, n in shapes.items()}
    arrays["labels"] = np.full((1, rows, limit), IGNORE_INDEX, np.int32)
    for r, documents in enumerate(packed):
        end = used = 0
        for number, d in enumerate(documents, start=1):
            n, p = len(d.ids), min(len(d.places), limit - used)
            arrays["input_ids"][0, r, end : end + n] = d.ids
            arrays["segment_ids"][0, r, end : end + n] = number
            arrays["predict_positions"][0, r, used : used + p] = d.places[:p] + end
            arrays["labels"][0, r, used : used + p] = d.labels[:p]
            end, used = end + n, used + p
    return arrays


def torch_batches(packed: Rows, length: int, device: str) -> list[tuple]:
    """(ids, mask or None, places in the flat batch, labels), padded to a multiple of 64."""
    import torch

    batches, group, rows = [], [], len(packed)
    ordered = sorted((d for documents in packed for d in documents), key=lambda d: -len(d.ids))
    for d in [*ordered, None]:
        width = -(-len(group[0].ids) // 64) * 64 if group else length
        width = min(width, length)
        if d is None or (len(group) + 1) * width > rows * length:
            ids = np.full((len(group), width), 4)
            mask = np.zeros((len(group), width), np.int64)
            for r, g in enumerate(group):
                ids[r, : len(g.ids)], mask[r, : len(g.ids)] = g.ids, 1
            places = np.concatenate([g.places + r * width for r, g in enumerate(group)])
            labels = np.concatenate([g.labels for g in group])
            batches.append(
                (
                    torch.tensor(ids, device=device),
                    None if mask.all() else torch.tensor(mask, device=device),
                    torch.tensor(places, device=device),
                    torch.tensor(labels, device=device),
                )
            )
            group = []
        if d is not None:
            group.append(d)
    return batches


def seconds_of(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> float:
    """Mean seconds of a step over at least `seconds` and five steps, after two to warm up.

    Steps follow each other without a wait between them, as they do in training.
    """
    for _ in range(2):
        wait(step())
    start, count, out = time.perf_counter(), 0, None
    while count < 5 or time.perf_counter() - start < seconds:
        out = step()
        count += 1
        if count % 5 == 0:
            wait(out)
    wait(out)
    return (time.perf_counter() - start) / count


def fitting(rows: int, run: Callable[[int], Any]) -> tuple[Any, int]:
    """run(rows), with half the rows again while the device's memory does not hold them."""
    while True:
        try:
            return run(rows), rows
        except Exception as error:
            text = f"{type(error).__name__} {error}"
            if rows == 1 or not ("RESOURCE_EXHAUSTED" in text or "OutOfMemory" in text):
                raise
        rows //= 2
        gc.collect()
        print(f"  does not fit: {rows} rows instead", flush=True)


class Ours:
    """Our step, on the weights given."""

    def __init__(self, config: TrainConfig, params: dict[str, np.ndarray]):
        mesh = make_mesh(devices=jax.devices()[:1])
        model = config.model
        self.attention = check(jax.devices()[0], dtype=model.dtype, head_dim=model.head_dim)
        self.trainer = Trainer(config, model, mesh)
        self.params, self.sharding = params, batch_sharding(mesh)

    def loss(self, packed: Rows, length: int) -> float:
        """The mean without dropout."""
        batch = jax.device_put(our_batch(packed, length), self.sharding)
        params = jax.device_put(self.params, self.trainer.shardings.params)
        total = self.trainer.eval_step(params, batch)[0]
        return float(total) / int((np.asarray(batch["labels"]) != IGNORE_INDEX).sum())

    def seconds(self, packed: Rows, length: int, least: float) -> float:
        """A step's."""
        batch = jax.device_put(our_batch(packed, length), self.sharding)
        state = self.trainer.fresh()

        def step():
            nonlocal state
            state, metrics = self.trainer.train_step(
                state, batch, np.float32(1e-4), np.float32(1e-4)
            )
            return metrics

        return seconds_of(step, jax.block_until_ready, least)


class Torch:
    """transformers' model with AdamW."""

    def __init__(self, model: Any, device: str, dtype: str):
        import torch

        self.model, self.device, self.dtype = model.to(device), device, dtype
        self.torch = torch
        self.loss_of = self._loss
        if device == "cuda":
            self.loss_of = torch.compile(self._loss, dynamic=None)

    def _loss(self, ids, mask, places, labels):
        torch = self.torch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            hidden = self.model.model(ids, attention_mask=mask).last_hidden_state
            picked = hidden.flatten(0, 1).index_select(0, places)
            logits = self.model.decoder(self.model.head(picked))
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    def loss(self, packed: Rows, length: int) -> float:
        """The mean."""
        batches = torch_batches(packed, length, self.device)
        with self.torch.no_grad():
            total = sum(float(self._loss(*batch)) for batch in batches)
        return total / predicted(packed)

    def seconds(self, packed: Rows, length: int, least: float) -> float:
        """A step's, over all batches."""
        torch = self.torch
        batches = torch_batches(packed, length, self.device)
        count = predicted(packed)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-5,
            fused=self.device == "cuda",
        )  # fmt: skip

        def step():
            for batch in batches:
                (self.loss_of(*batch) / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        return seconds_of(step, lambda _: wait(), least)


def reference_model(config: ModernBertConfig) -> Any:
    """transformers' model with seeded weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "pad_token_id", "bos_token_id",
        "cls_token_id", "eos_token_id", "sep_token_id",
    )  # fmt: skip
    fields = {name: getattr(config, name) for name in names}
    made = transformers.ModernBertConfig(**fields, attn_implementation="sdpa")  # type: ignore[call-arg]
    return transformers.ModernBertForMaskedLM(made)


def measure(size: str, args: argparse.Namespace, lengths: list[int]) -> list[dict[str, Any]]:
    """Results of one model."""
    dtype = "float32" if args.quick else "bfloat16"
    model_config = getattr(ModernBertConfig, size)(dtype=dtype, attention_out_dropout=0.1)
    kind = jax.devices()[0].device_kind
    torch_device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.devices()[0].platform)
    reference = reference_model(model_config) if HAS_TORCH else None
    if reference is None:
        params = flatten(ModernBertForMaskedLM(model_config, rngs=nnx.Rngs(0)))
        params = {path: np.asarray(value) for path, value in params.items()}
    else:
        tensors = {k: v.detach().numpy().copy() for k, v in reference.state_dict().items()}
        params = hf_to_params(ModernBertForMaskedLM, model_config, tensors)
    config = TrainConfig(model=model_config, remat=args.remat, scan_layers=args.scan_layers)
    ours = Ours(config, params)
    theirs = None
    if reference is not None and torch_device is not None:
        theirs = Torch(reference, torch_device, dtype)
    results = []
    cases = [(length, documents) for length in lengths for documents in ("full", "packed")]
    if theirs is not None:  # before anything is trained; one row, so that memory is no matter
        for length, documents_kind in cases:
            few = make_rows(documents_kind, 1, length, model_config.vocab_size)
            pair = ours.loss(few, length), theirs.loss(few, length)
            assert abs(pair[0] - pair[1]) < (1e-4 if args.quick else 0.03), pair
    for length, documents_kind in cases:
        wanted = max(1, (args.tokens or MICRO_TOKENS[size]) // length)

        def packed_of(rows, length=length, kind=documents_kind):
            return make_rows(kind, rows, length, model_config.vocab_size)

        row: dict[str, Any] = {"size": size, "sequence_length": length, "documents": documents_kind}
        row["attention"] = ours.attention.reason
        for name, side in (("ours", ours), ("torch", theirs)):
            if side is None:
                continue
            seconds, rows = fitting(
                wanted,
                lambda rows, side=side, length=length, packed_of=packed_of: side.seconds(
                    packed_of(rows), length, args.seconds
                ),
            )
            packed = packed_of(rows)
            sizes = np.array([len(d.ids) for documents in packed for d in documents])
            flops = model_flops(model_config, sizes, predicted(packed))
            speed = sizes.sum() / seconds
            row[name] = {
                "rows": rows,
                "mean_document_tokens": float(sizes.mean()),
                "step_seconds": seconds,
                "tokens_per_second": speed,
                "padding": 1 - float(sizes.sum()) / (rows * length) if side is ours else None,
                "mfu": mfu(speed, flops.train / sizes.sum(), kind) if kind in PEAK else None,
            }
            gc.collect()
        results.append(row)
        print(line(row), flush=True)
    return results


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = f"{row['size']:6} {row['sequence_length']:5} {row['documents']:7}"
    for name in ("ours", "torch"):
        if name in row:
            part = row[name]
            share = "" if part["mfu"] is None else f" MFU {part['mfu']:6.1%}"
            text += f"  {name} {part['tokens_per_second']:9,.0f} tok/s ({part['rows']} rows){share}"
    if "torch" in row:
        ratio = row["ours"]["tokens_per_second"] / row["torch"]["tokens_per_second"]
        text += f"  {ratio:.2f}x"
    return text


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model in float32, short rows")
    parser.add_argument("--sizes", nargs="*", choices=("base", "large"))
    parser.add_argument("--lengths", nargs="*", type=int)
    parser.add_argument("--tokens", type=int, help="of a step, at first")
    parser.add_argument("--seconds", type=float, help="a timing, at least")
    parser.add_argument("--remat", default="none", choices=REMAT)
    parser.add_argument("--scan-layers", action="store_true")
    args = parser.parse_args()
    args.seconds = args.seconds or (1.0 if args.quick else 5.0)
    sizes = args.sizes or (["tiny"] if args.quick else ["base", "large"])
    lengths = args.lengths or ([128] if args.quick else [1024, 8192])
    device = jax.devices()[0]
    packages = ("jax", "torch", "transformers") if HAS_TORCH else ("jax",)
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    print(f"{device.device_kind}, {', '.join(f'{k} {v}' for k, v in versions.items())}")
    record = {
        "command": " ".join(["python tests/benchmarks/train_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "versions": versions,
        "results": [result for size in sizes for result in measure(size, args, lengths)],
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
