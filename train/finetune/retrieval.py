"""python -m train finetune --task retrieval: a bi-encoder trained on pairs, in-batch negatives.

A folder holds train.jsonl, lines of {"query", "positive"} and perhaps "negative"; and for scores,
as BEIR has it, queries.jsonl and corpus.jsonl, lines of {"_id", "text"} and perhaps "title", and
qrels.tsv, "query-id<TAB>corpus-id<TAB>score" under a header. What is written is in HF's layout and
sentence-transformers' as well.

Every query of a batch is told apart from the positives and negatives of all others, on all devices.
A batch may be larger than memory allows at once: its texts are embedded in chunks without
gradients, the loss's gradient with regard to the embeddings is found, and each chunk is run again
with that as its cotangent (gradient caching, arXiv 2101.06983), which gives the same gradient.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

from modernbert_jax import ModernBertConfig, ModernBertModel
from modernbert_jax.attention import sharded
from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.heads import pool
from modernbert_jax.inference.embedder import unit
from modernbert_jax.packing import fill_rows
from modernbert_jax.tokenizer import AutoTokenizer

from ..common.card import NOT_FOR_CARE, start_facts, versions
from ..common.optimizer import adamw
from ..common.sharding import DATA, MeshShape, make_mesh
from ..common.workdir import start_folder


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """A retrieval run."""

    data: str  # folder with train.jsonl; queries.jsonl, corpus.jsonl and qrels.tsv for scores
    model: str  # checkpoint: folder (HF, Orbax), a pretraining run's workdir, or hub id
    out: str = "runs/retrieval"
    seed: int = 42
    lr: float = 2e-5
    weight_decay: float = 0.01
    epochs: int = 1
    warmup: float = 0.1  # share of the steps
    batch: int = 128  # pairs a step, over all devices
    chunk: int = 32  # texts a device embeds at once; the gradient does not depend on it
    temperature: float = 0.05
    max_length: int = 512  # tokens; longer texts are cut
    pooling: Literal["mean", "cls"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    devices: int = 1

    def validate(self) -> None:
        """Raises ValueError with one line for values that cannot be."""
        for name in ("epochs", "batch", "chunk", "max_length", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch < 2:
            raise ValueError("batch: expected at least 2 pairs, one is no negative to itself")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, got {self.temperature}")


class Encoder:
    """Texts to unit vectors, in rows packed with `chunk` texts, one row a device."""

    def __init__(self, config: RetrievalConfig, model_config: ModernBertConfig):
        self.config, self.model_config = config, model_config
        self.mesh = make_mesh(MeshShape(config.devices), jax.local_devices())
        self.rows = NamedSharding(self.mesh, P(DATA, None))
        self.everywhere = NamedSharding(self.mesh, P())
        self.attention = sharded(self.mesh, rows=(DATA,))
        self.embed = jax.jit(self._embed)
        self.pull = jax.jit(self._pull, donate_argnums=3)

    def _embed(self, params, ids_BL, segments_BL):
        model = module_of(ModernBertModel, self.model_config, params)
        out = model(ids_BL, segment_ids=segments_BL, attention=self.attention)
        pooled_BSD = pool(
            out.last_hidden_state, segments_BL, self.config.chunk, self.config.pooling
        )
        return unit(pooled_BSD)

    def _pull(self, params, ids_BL, segments_BL, sums, cotangent_BSD):
        _, pull = jax.vjp(lambda p: self._embed(p, ids_BL, segments_BL), params)
        return jax.tree.map(jnp.add, sums, pull(cotangent_BSD)[0])

    def groups(self, texts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, jax.Array, jax.Array]]:
        """(which texts, ids, segments) of each call: chunk texts a row, a row a device."""
        order = np.argsort([-len(t) for t in texts], kind="stable")  # alike in length
        devices, chunk = self.config.devices, self.config.chunk
        out = []
        for first in range(0, len(order), devices * chunk):
            some = order[first : first + devices * chunk]
            parts = [some[d::devices] for d in range(devices)]
            ids, segments = fill_rows(texts, parts)
            place = lambda x: jax.device_put(x, self.rows)  # noqa: E731
            which = np.full((devices, chunk), -1)
            for row, part in enumerate(parts):
                which[row, : len(part)] = part
            out.append((which, place(ids), place(segments)))
        return out

    def encode(self, params, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors [texts, D], float32."""
        out = np.zeros((len(texts), self.model_config.hidden_size), np.float32)
        for which, ids, segments in self.groups(texts):
            out[which[which >= 0]] = np.asarray(self.embed(params, ids, segments))[which >= 0]
        return out

    def gradient(self, params, queries: Sequence[np.ndarray], documents: Sequence[np.ndarray]):
        """(loss, gradients): query i belongs to document i, all other documents are negatives."""
        texts = [*queries, *documents]
        vectors = self.encode(params, texts)
        loss, d_vectors = _contrast(vectors, len(queries), self.config.temperature)
        d_vectors = np.asarray(d_vectors)
        sums = jax.tree.map(jnp.zeros_like, params)
        for which, ids, segments in self.groups(texts):
            cotangent = np.where(which[..., None] >= 0, d_vectors[which], 0.0).astype(np.float32)
            cotangent = jax.device_put(cotangent, NamedSharding(self.mesh, P(DATA, None, None)))
            sums = self.pull(params, ids, segments, sums, cotangent)
        return loss, sums


def contrast(vectors_ND: jax.Array, queries: int, temperature: float) -> jax.Array:
    """Mean cross-entropy (nats) of picking each query's document among all; InfoNCE."""
    scores = jnp.einsum(
        "QD,MD->QM", vectors_ND[:queries], vectors_ND[queries:],
        precision=jax.lax.Precision.HIGHEST,
    ) / temperature  # fmt: skip
    own = jnp.arange(queries)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, own))


_contrast = jax.jit(jax.value_and_grad(contrast), static_argnums=1)


# Scores.


def retrieval_scores(
    queries_QD: np.ndarray, documents_MD: np.ndarray, relevant: list[dict[int, float]], k: int = 10
) -> dict[str, float]:
    """nDCG@k, recall@k, recall@100 and MRR@k by brute force. relevant: document -> gain, a query.

    nDCG as trec_eval: linear gains, log2 discount. Ties go to the earlier document.
    """
    found: dict[str, list[float]] = {name: [] for name in ("ndcg", "recall", "recall100", "mrr")}
    for first in range(0, len(queries_QD), 256):
        scores_QM = queries_QD[first : first + 256] @ documents_MD.T
        order_QM = np.argsort(-scores_QM, axis=1, kind="stable")[:, : max(k, 100)]
        for order, gains in zip(order_QM, relevant[first : first + 256], strict=True):
            got = [gains.get(int(d), 0.0) for d in order]
            discount = 1 / np.log2(np.arange(2, k + 2))
            ideal = sorted(gains.values(), reverse=True)[:k]
            best = float(np.dot(ideal, discount[: len(ideal)]))
            found["ndcg"].append(float(np.dot(got[:k], discount[: len(got[:k])])) / best)
            hits = sum(g > 0 for g in gains.values())
            found["recall"].append(sum(g > 0 for g in got[:k]) / hits)
            found["recall100"].append(sum(g > 0 for g in got[:100]) / hits)
            found["mrr"].append(next((1 / n for n, g in enumerate(got[:k], 1) if g > 0), 0.0))
    names = {"ndcg": f"ndcg@{k}", "recall": f"recall@{k}", "recall100": "recall@100"}
    return {names.get(n, f"mrr@{k}"): float(np.mean(v)) for n, v in found.items()}


# Files.


def _lines(path: pathlib.Path, *fields: str) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected lines of JSON with {', '.join(fields)}")
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            ok = isinstance(record, dict) and all(isinstance(record.get(f), str) for f in fields)
        except ValueError:
            ok = False
        if not ok:
            raise ValueError(f"{path}, line {number}: expected JSON with {', '.join(fields)}")
        out.append(record)
    return out


def read_judged(folder: pathlib.Path) -> tuple[list[str], list[str], list[dict[int, float]]]:
    """(queries, documents, relevant documents of each query) of BEIR's three files."""
    documents = _lines(folder / "corpus.jsonl", "_id", "text")
    queries = {q["_id"]: q["text"] for q in _lines(folder / "queries.jsonl", "_id", "text")}
    number = {d["_id"]: i for i, d in enumerate(documents)}
    judged: dict[str, dict[int, float]] = {}
    path = folder / "qrels.tsv"
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        parts = line.split("\t")
        try:
            query, document, gain = parts[0], number[parts[1]], float(parts[2])
            queries[query]
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                f"{path}, line {n}: expected query-id, corpus-id and score of queries.jsonl and "
                "corpus.jsonl"
            ) from None
        if gain > 0:
            judged.setdefault(query, {})[document] = gain
    texts = [" ".join(t for t in (d.get("title", ""), d["text"]) if t) for d in documents]
    return [queries[q] for q in judged], texts, list(judged.values())


def save(
    folder: pathlib.Path,
    model: Any,
    tokenizer: Any,
    config: RetrievalConfig,
    facts: dict[str, Any],
) -> None:
    """HF's layout, and what sentence-transformers needs beside it. facts: of the model card."""
    model.save_pretrained(folder, tokenizer=tokenizer, card=facts)
    parts = [
        ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"),
    ]  # fmt: skip
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": config.pooling == "cls",
        "pooling_mode_mean_tokens": config.pooling == "mean",
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    write_text(folder / "1_Pooling" / "config.json", json.dumps(pooling, indent=2) + "\n")
    length = {"max_seq_length": config.max_length, "do_lower_case": False}
    write_text(folder / "sentence_bert_config.json", json.dumps(length, indent=2) + "\n")
    write_text(folder / "modules.json", json.dumps(modules, indent=2) + "\n")


# The run.


def train(config: RetrievalConfig) -> dict[str, Any]:
    """Trains, scores where there are judgements, and writes OUT/model and OUT/results.json.

    Raises FileNotFoundError or ValueError with one line for bad input.
    """
    config.validate()
    data, out = pathlib.Path(config.data), pathlib.Path(config.out)
    pairs = _lines(data / "train.jsonl", "query", "positive")
    if len(pairs) < 2:
        raise ValueError(f"{data / 'train.jsonl'}: expected at least 2 pairs, got {len(pairs)}")
    folder = start_folder(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ModernBertModel.from_pretrained(folder, dtype=config.dtype, param_dtype="float32")
    encoder = Encoder(config, model.config)
    params = jax.device_put(flatten(model), encoder.everywhere)
    how = {"truncation": True, "max_length": config.max_length}

    def tokens(texts: list[str]) -> list[np.ndarray]:
        ids = tokenizer(texts, **how)["input_ids"] if texts else []
        return [np.asarray(i, np.int32) for i in ids]

    queries, positives = (tokens([p[k] for p in pairs]) for k in ("query", "positive"))
    negatives = tokens([p.get("negative", "") for p in pairs])
    has_negative = [bool(p.get("negative")) for p in pairs]
    judged = read_judged(data) if (data / "qrels.tsv").exists() else None

    def score() -> dict[str, float]:
        if judged is None:
            return {}
        asked, documents, relevant = judged
        vectors = [encoder.encode(params, tokens(texts)) for texts in (asked, documents)]
        return retrieval_scores(vectors[0], vectors[1], relevant)

    batch = min(config.batch, len(pairs))
    steps = config.epochs * (len(pairs) // batch)
    warmup = max(1, int(config.warmup * steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, warmup + 1))
    optimizer = adamw()
    state = optimizer.init(params)

    def apply(params: Any, state: Any, grads: Any, learning_rate: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(
            grads, state, params, learning_rate=learning_rate, weight_decay=config.weight_decay
        )
        return optax.apply_updates(params, updates), state

    update = jax.jit(apply, donate_argnums=(0, 1))
    before, losses, started = score(), [], time.perf_counter()
    bar = tqdm(total=steps, desc="retrieval", unit=" steps", disable=not sys.stderr.isatty())
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(len(pairs))
        for first in range(0, len(order) - batch + 1, batch):
            some = order[first : first + batch]
            documents = [positives[i] for i in some] + [
                negatives[i] for i in some if has_negative[i]
            ]
            loss, grads = encoder.gradient(params, [queries[i] for i in some], documents)
            params, state = update(params, state, grads, rate(len(losses)))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"step {len(losses)}: the loss is {losses[-1]}; lower --lr")
            bar.update()
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    bar.close()
    result = {
        "settings": dataclasses.asdict(config),
        "before": before,
        "after": score(),
        "losses": losses,
        "seconds": time.perf_counter() - started,
    }
    trained = module_of(ModernBertModel, model.config, params)
    facts = retrieval_facts(config, len(pairs), len(losses), before, result["after"])
    save(out / "model", trained, tokenizer, config, facts)
    write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    for name in result["after"]:
        print(f"{name}: {before[name]:.4f} before, {result['after'][name]:.4f} after")
    print(f"model, for transformers and sentence-transformers: {out / 'model'}")
    return result


def retrieval_facts(
    config: RetrievalConfig,
    pairs: int,
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    """Facts of a bi-encoder. before and after: its scores, empty without judgements."""
    start = start_facts(config.model)
    return {
        "title": f"{start['name']}, trained for retrieval",
        "base_model": start.get("base_model"),
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction"],
        "training": {
            "Task": "retrieval: each query picks its document among all of a step",
            "Start": start["name"],
            "Pairs": pairs,
            "Steps": steps,
            "Pairs of a step": config.batch,
            "Learning rate": f"{config.lr:g}",
            "Temperature": config.temperature,
            "Pooling": f"{config.pooling}, then length 1",
            "Longest text": f"{config.max_length:,} tokens",
            "Seed": config.seed,
            "Versions": versions(),
        },
        "tables": {
            "Scores": [
                {"score": name, "before": f"{before[name]:.4f}", "after": f"{after[name]:.4f}"}
                for name in after
            ]
        },
        "limits": [NOT_FOR_CARE],
    }
