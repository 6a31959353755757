"""python -m train finetune --task retrieval: a bi-encoder trained on pairs, in-batch negatives.

The files are described in data.py. The model is written in the layouts of Hugging Face and
sentence-transformers.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from modernbert_jax import ModernBertModel
from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.inference.sentence import Normalize, Pooling, SentenceModel, write_sentence
from modernbert_jax.tokenizer import AutoTokenizer, check_ids, max_tokens

from ...common.card import NOT_FOR_CARE, start_facts, versions
from ...common.optimizer import adamw
from ...common.progress import Progress
from ...common.workdir import start_folder
from .config import RetrievalConfig
from .data import read_judged, read_records
from .model import Encoder


def train(config: RetrievalConfig) -> dict[str, Any]:
    """Trains, scores if there are relevance judgments, writes OUT/model and OUT/results.json.

    Raises FileNotFoundError or ValueError with one line for bad input.
    """
    config.validate()
    data, out = pathlib.Path(config.data), pathlib.Path(config.out)
    pairs = read_records(data / "train.jsonl", "query", "positive", optional="negative")
    if len(pairs) < 2:
        raise ValueError(f"{data / 'train.jsonl'}: expected at least 2 pairs, got {len(pairs)}")
    folder = start_folder(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ModernBertModel.from_pretrained(folder, dtype=config.dtype, param_dtype="float32")
    check_ids(tokenizer, model.config.vocab_size)
    limit = min(config.max_length, model.config.max_position_embeddings)
    config = dataclasses.replace(config, max_length=max_tokens(tokenizer, limit))
    encoder = Encoder(config, model.config)
    params = jax.device_put(flatten(model), encoder.everywhere)
    options = {"truncation": True, "max_length": config.max_length, "split_special_tokens": True}

    def tokens(texts: list[str]) -> list[np.ndarray]:
        ids = tokenizer(texts, **options)["input_ids"] if texts else []
        return [np.asarray(i, np.int32) for i in ids]

    queries, positives = (tokens([p[k] for p in pairs]) for k in ("query", "positive"))
    negatives = tokens([p["negative"] for p in pairs])
    has_negative = [bool(p["negative"]) for p in pairs]
    judged = read_judged(data) if (data / "qrels.tsv").exists() else None

    def score() -> dict[str, float]:
        if judged is None:
            return {}
        asked, documents, relevant = judged
        vectors = [encoder.encode(params, tokens(texts)) for texts in (asked, documents)]
        return retrieval_scores(vectors[0], vectors[1], relevant)

    batch = min(config.batch_size, len(pairs))
    steps = config.epochs * (len(pairs) // batch)
    warmup = max(1, int(config.warmup_ratio * steps))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1)
    )
    optimizer = adamw()
    state = optimizer.init(params)

    def apply(params: Any, state: Any, grads: Any, learning_rate: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(
            grads, state, params, learning_rate=learning_rate, weight_decay=config.weight_decay
        )
        return optax.apply_updates(params, updates), state

    update = jax.jit(apply, donate_argnums=(0, 1))
    before, losses, started = score(), [], time.perf_counter()
    bar = Progress(total=steps, desc="retrieval", unit=" steps")
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
                raise RuntimeError(
                    f"step {len(losses)}: the loss is {losses[-1]}; lower --learning-rate"
                )
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


def retrieval_scores(
    queries_QD: np.ndarray, documents_MD: np.ndarray, relevant: list[dict[int, float]], k: int = 10
) -> dict[str, float]:
    """nDCG@k, recall@k, recall@100 and MRR@k by brute force. relevant: {document: gain} per query.

    nDCG as in trec_eval: linear gains, log2 discount. Of equal scores the earlier document wins.
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


def save(
    folder: pathlib.Path,
    model: Any,
    tokenizer: Any,
    config: RetrievalConfig,
    facts: dict[str, Any],
) -> None:
    """Writes a Hugging Face folder with the modules that sentence-transformers reads.

    facts: of the model card.
    """
    model.save_pretrained(folder, tokenizer=tokenizer, card=facts)
    sentence = SentenceModel((Pooling((config.pooling,)), Normalize()))
    write_sentence(folder, sentence, model.config.hidden_size, config.max_length)


def retrieval_facts(
    config: RetrievalConfig,
    pairs: int,
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    """Facts about a bi-encoder. before, after: its scores, empty without relevance judgments."""
    start = start_facts(config.model)
    return {
        "title": f"{start['name']}, trained for retrieval",
        "base_model": start.get("base_model"),
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction"],
        "training": {
            "Task": "retrieval with in-batch negatives",
            "Start": start["name"],
            "Pairs": pairs,
            "Steps": steps,
            "Pairs per step": config.batch_size,
            "Learning rate": f"{config.learning_rate:g}",
            "Temperature": config.temperature,
            "Pooling": f"{config.pooling}, then normalized to length 1",
            "Maximum length": f"{config.max_length:,} tokens",
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
