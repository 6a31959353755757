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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from modernbert_jax import ModernBertModel
from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.checkpoint.params import flatten, module_of
from modernbert_jax.inference.sentence import Normalize, Pooling, SentenceModel, write_sentence
from modernbert_jax.tokenizer import AutoTokenizer, check_ids, max_tokens
from modernbert_jax.weights import decays

from ...common.card import NOT_FOR_CARE, start_facts, versions
from ...common.optimizer import adamw
from ...common.progress import Progress
from ...common.workdir import start_folder
from .config import LOSSES, TEMPERATURES, RetrievalConfig
from .data import read_examples
from .model import Encoder
from .multi_vector import MultiVectorEncoder
from .scores import Measures, read_measures
from .teacher import teach


def train(config: RetrievalConfig) -> dict[str, Any]:
    """Trains, scores if there are files for it, writes OUT/model and OUT/results.json.

    Raises FileNotFoundError or ValueError with one line for bad input.
    """
    config.validate()
    data, out = pathlib.Path(config.data), pathlib.Path(config.out)
    examples = read_examples(data / "train.jsonl", config.loss)
    measures = read_measures(data)
    if config.multi_vector and measures.pairs is not None:
        raise ValueError(
            f"{data / 'pairs.jsonl'}: expected none with --multi-vector, which scores searches only"
        )
    folder = pathlib.Path(start_folder(config.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ModernBertModel.from_pretrained(folder, dtype=config.dtype, param_dtype="float32")
    check_ids(tokenizer, model.config.vocab_size)
    config.check_width(model.config.hidden_size)
    teacher = None
    if config.teacher is not None:
        targets, teacher = teach(config, examples, model.config.hidden_size)
        examples = dataclasses.replace(examples, targets=targets)
    limit = min(config.max_length, model.config.max_position_embeddings)
    config = dataclasses.replace(config, max_length=max_tokens(tokenizer, limit))
    encoder: BiEncoder | MultiVectorEncoder = (
        MultiVectorEncoder(config, model, tokenizer, folder)
        if config.multi_vector
        else BiEncoder(config, model, tokenizer)
    )
    params = jax.device_put(encoder.params, encoder.everywhere)
    # All queries, then the documents of each example.
    queries = encoder.tokens([row[0] for row in examples.texts], True)
    ids = iter(encoder.tokens([text for row in examples.texts for text in row[1:]], False))
    texts = [
        [query, *itertools.islice(ids, len(row) - 1)]
        for query, row in zip(queries, examples.texts, strict=True)
    ]

    def score() -> dict[str, float]:
        return encoder.score(params, measures)

    batch = min(config.batch_size, len(texts))
    steps = config.epochs * (len(texts) // batch)
    warmup = max(1, int(config.warmup_ratio * steps))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1)
    )
    optimizer = adamw(decayed=encoder.decays)
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
    facts = retrieval_facts(config, len(texts), len(losses), before, result["after"], teacher)
    encoder.save(out / "model", params, facts)
    write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    for name in result["after"]:
        print(f"{name}: {before[name]:.4f} before, {result['after'][name]:.4f} after")
    readers = "PyLate" if config.multi_vector else "transformers"
    print(f"model, for {readers} and sentence-transformers: {out / 'model'}")
    return result


class BiEncoder(Encoder):
    """The encoder of vectors of texts, with what surrounds its training."""

    decays = staticmethod(decays)

    def __init__(self, config: RetrievalConfig, model: ModernBertModel, tokenizer: Any):
        super().__init__(config, model.config)
        self.tokenizer, self.params = tokenizer, flatten(model)

    def tokens(self, texts: Sequence[str], query: bool) -> list[np.ndarray]:
        """Tokenizes texts; queries are texts as all others."""
        options = {"truncation": True, "max_length": self.config.max_length}
        ids = (
            self.tokenizer(list(texts), split_special_tokens=True, **options)["input_ids"]
            if texts
            else []
        )
        return [np.asarray(i, np.int32) for i in ids]

    def score(self, params: Mapping[str, Any], measures: Measures) -> dict[str, float]:
        """The scores of the files that there are."""
        encode = lambda texts: self.encode(params, self.tokens(texts, False))  # noqa: E731
        return measures.score(encode, self.config.matryoshka_dims)

    def save(self, folder: pathlib.Path, params: Mapping[str, Any], facts: dict[str, Any]) -> None:
        """Writes a Hugging Face folder with the modules that sentence-transformers reads.

        facts: of the model card.
        """
        model = module_of(ModernBertModel, self.model_config, params)
        model.save_pretrained(folder, tokenizer=self.tokenizer, card=facts)
        modules = (Pooling((self.config.pooling,)), Normalize())
        sentence = SentenceModel(modules, truncate_dim=self.config.truncate_dim)
        write_sentence(folder, sentence, model.config.hidden_size, self.config.max_length)


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
    vectors = {"Pooling": f"{config.pooling}, then normalized to length 1"}
    tags = ["sentence-transformers", "feature-extraction"]
    if config.multi_vector:
        vectors = {
            "Vectors": "one per token, of length 1, scored by MaxSim",
            "Query length": f"{config.query_length} tokens, filled up with [MASK]",
        }
        tags = ["ColBERT", "PyLate", *tags]
    return {
        "title": f"{start['name']}, trained for retrieval",
        "base_model": start.get("base_model"),
        "library_name": "PyLate" if config.multi_vector else "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": tags,
        "training": {
            "Task": "retrieval",
            "Loss": LOSSES[config.loss] + matryoshka,
            **({"Teacher": f"{teacher['teacher']} ({teacher['kind']})"} if teacher else {}),
            "Start": start["name"],
            "Examples": examples,
            "Steps": steps,
            "Examples per step": config.batch_size,
            "Learning rate": f"{config.learning_rate:g}",
            **({"Temperature": config.divisor} if config.loss in TEMPERATURES else {}),
            **vectors,
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
