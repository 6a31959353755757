"""python -m train finetune --task retrieval: trains a bi-encoder with one of several losses.

The files are described in data.py, the losses in losses.py. The model is written in the layouts of
Hugging Face and sentence-transformers.
"""

import dataclasses
import itertools
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
from .config import COMPARING, LOSSES, RetrievalConfig
from .data import read_examples
from .model import Encoder
from .scores import read_measures
from .teacher import teach


def train(config: RetrievalConfig) -> dict[str, Any]:
    """Trains, scores if there are files for it, writes OUT/model and OUT/results.json.

    Raises FileNotFoundError or ValueError with one line for bad input.
    """
    config.validate()
    data, out = pathlib.Path(config.data), pathlib.Path(config.out)
    examples = read_examples(data / "train.jsonl", config.loss)
    measures = read_measures(data)
    folder = start_folder(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ModernBertModel.from_pretrained(folder, dtype=config.dtype, param_dtype="float32")
    check_ids(tokenizer, model.config.vocab_size)
    config.check_width(model.config.hidden_size)
    teacher = None
    if config.teacher:
        targets, teacher = teach(config, examples, model.config.hidden_size)
        examples = dataclasses.replace(examples, targets=targets)
    limit = min(config.max_length, model.config.max_position_embeddings)
    config = dataclasses.replace(config, max_length=max_tokens(tokenizer, limit))
    encoder = Encoder(config, model.config)
    params = jax.device_put(flatten(model), encoder.everywhere)
    options = {"truncation": True, "max_length": config.max_length, "split_special_tokens": True}

    def tokens(texts: list[str]) -> list[np.ndarray]:
        ids = tokenizer(texts, **options)["input_ids"] if texts else []
        return [np.asarray(i, np.int32) for i in ids]

    ids = iter(tokens(list(itertools.chain(*examples.texts))))
    texts = [list(itertools.islice(ids, len(row))) for row in examples.texts]

    def score() -> dict[str, float]:
        encode = lambda texts: encoder.encode(params, tokens(texts))  # noqa: E731
        return measures.score(encode, config.matryoshka_dims)

    batch = min(config.batch_size, len(texts))
    steps = config.epochs * (len(texts) // batch)
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
        order = np.random.default_rng((config.seed, epoch)).permutation(len(texts))
        for first in range(0, len(order) - batch + 1, batch):
            some = order[first : first + batch]
            rows = [texts[i] for i in some]
            columns = [
                [row[column] for row in rows if column < len(row)]
                for column in range(max(map(len, rows)))
            ]
            targets = None if examples.targets is None else examples.targets[some]
            loss, grads = encoder.gradient(params, columns, targets)
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
        "teacher": teacher,
        "before": before,
        "after": score(),
        "losses": losses,
        "seconds": time.perf_counter() - started,
    }
    trained = module_of(ModernBertModel, model.config, params)
    facts = retrieval_facts(config, len(texts), len(losses), before, result["after"], teacher)
    save(out / "model", trained, tokenizer, config, facts)
    write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    for name in result["after"]:
        print(f"{name}: {before[name]:.4f} before, {result['after'][name]:.4f} after")
    print(f"model, for transformers and sentence-transformers: {out / 'model'}")
    return result


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
    modules = (Pooling((config.pooling,)), Normalize())
    sentence = SentenceModel(modules, truncate_dim=config.truncate_dim)
    write_sentence(folder, sentence, model.config.hidden_size, config.max_length)


def retrieval_facts(
    config: RetrievalConfig,
    examples: int,
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    teacher: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Facts about a bi-encoder.

    before, after: its scores, empty without files for them. teacher: facts, of `teach`.
    """
    start = start_facts(config.model)
    dims = ", ".join(map(str, config.matryoshka_dims))
    matryoshka = f", also of the first {dims} dimensions (MatryoshkaLoss)" if dims else ""
    return {
        "title": f"{start['name']}, trained for retrieval",
        "base_model": start.get("base_model"),
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction"],
        "training": {
            "Task": "retrieval",
            "Loss": LOSSES[config.loss] + matryoshka,
            **({"Teacher": f"{teacher['teacher']} ({teacher['kind']})"} if teacher else {}),
            "Start": start["name"],
            "Examples": examples,
            "Steps": steps,
            "Examples per step": config.batch_size,
            "Learning rate": f"{config.learning_rate:g}",
            **({"Temperature": config.temperature} if config.loss in COMPARING else {}),
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
