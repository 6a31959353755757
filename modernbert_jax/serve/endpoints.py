"""What a checkpoint answers: one class per endpoint, from a request's JSON to its answer's."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from modernbert_jax.heads import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)
from modernbert_jax.inference.embedder import Embedder
from modernbert_jax.inference.multi_vector import MultiVectorEmbedder
from modernbert_jax.inference.pipelines import FillMask, Reranker, TextClassification
from modernbert_jax.inference.sentence import resolve_prompt
from modernbert_jax.model import ModernBertModel
from modernbert_jax.packing import SLOT_TOKENS
from modernbert_jax.tokenizer import backend_json
from modernbert_jax.untrusted import panics_as_errors

MAX_TEXTS = 2048  # per request, as in OpenAI's API


class Refused(Exception):
    """A request that is answered with an error: its status, message and parameter."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclasses.dataclass(frozen=True)
class Work:
    """What one request asks for.

    key: requests with equal keys share rows. values: texts, pairs of texts or lists of token ids.
    truncate: whether longer values are cut to the model's limit, or refused. answer: makes the JSON
    from the results and the number of tokens.
    """

    key: Hashable
    values: Sequence[Any]
    truncate: bool
    answer: Callable[[list[Any], int], Any]


class Counter:
    """Counts tokens in any thread; the pipelines' own tokenizers belong to the computing thread."""

    def __init__(self, tokenizer: Any, max_length: int, prompt: str = ""):
        """prompt: precedes each text, or the first of a pair."""
        self._prompt = prompt
        self._backend = tokenizers.Tokenizer.from_str(backend_json(tokenizer))
        self._mask = tokenizer.mask_token_id
        self.max_length = max_length

    def ids(self, values: Sequence[Any], param: str) -> list[list[int]]:
        """Returns the complete token ids of texts, pairs or lists of ids."""
        try:
            with panics_as_errors():
                texts = [self._begun(v) for v in values if not isinstance(v, list)]
                encoded = iter(self._backend.encode_batch(texts))
        except Exception:  # the backend raises a bare Exception, which may show the text
            raise Refused(400, f"{param}: the tokenizer cannot read a text", param) from None
        return [v if isinstance(v, list) else next(encoded).ids for v in values]

    def _begun(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._prompt + value
        return self._prompt + value[0], value[1]

    def tokens(self, work: Work, param: str, masks: bool = False) -> tuple[list[int], int]:
        """Returns how much of a row each value takes, and the tokens of all values.

        Raises Refused for a value that is longer than the model supports, unless it is truncated.
        """
        ids = self.ids(work.values, param)
        lengths = [len(i) for i in ids]
        if max(lengths) > self.max_length:
            if not work.truncate:
                number = next(n for n, size in enumerate(lengths) if size > self.max_length)
                raise Refused(
                    413,
                    f"{param}: expected at most {self.max_length:,} tokens per text, number "
                    f'{number} has {lengths[number]:,}; shorten it, or pass "truncate": true',
                    param,
                    "context_length_exceeded",
                )
            lengths = [min(size, self.max_length) for size in lengths]
        room = lengths
        if masks:  # each mask takes a slot of the row
            masks_of = [SLOT_TOKENS * i.count(self._mask) for i in ids]
            room = [max(pair) for pair in zip(lengths, masks_of, strict=True)]
        return room, sum(lengths)


class Endpoint:
    """One path: reads a request, counts it, and runs rows of values."""

    path: str
    param: str  # the field with the texts
    counter: Counter

    def read(self, body: dict[str, Any]) -> Work:
        """Returns the work of a request. Raises Refused for a field that is wrong or unknown."""
        raise NotImplementedError

    def count(self, work: Work) -> tuple[list[int], int]:
        """Returns how much of a row each value takes, and the tokens of all values."""
        return self.counter.tokens(work, self.param)

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        """Returns one result per value."""
        raise NotImplementedError

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compiles the programs for rows of up to each number of tokens."""
        raise NotImplementedError


class Embeddings(Endpoint):
    """POST /v1/embeddings, as OpenAI's."""

    path: str = "/v1/embeddings"
    param: str = "input"

    def __init__(self, embedder: Any, name: str, batch_tokens: int, prompt: str = ""):
        """prompt: that `encode` puts before each text by default."""
        self.embedder, self.name, self.batch_tokens = embedder, name, batch_tokens
        self.counter = Counter(embedder.tokenizer, embedder.max_length, prompt)

    def read(self, body: dict[str, Any]) -> Work:
        fields = Fields(body, {"input", "encoding_format", "dimensions", "truncate"}, self.name)
        values = self._values(fields)
        base64_wanted = fields.choice("encoding_format", ("float", "base64")) == "base64"
        dimensions = fields.number("dimensions", 1, self.embedder.dimension)

        def answer(results: list[Any], tokens: int) -> Any:
            vectors = np.stack(results).astype("<f4")
            if dimensions is not None and dimensions < vectors.shape[1]:
                vectors = vectors[:, :dimensions]
                if self.embedder.normalize:
                    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
                    vectors = vectors / np.maximum(lengths, np.float32(1e-12))
            if not np.isfinite(vectors).all():
                raise ValueError("expected finite vectors")
            data = [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": base64.b64encode(vector.tobytes()).decode()
                    if base64_wanted
                    else vector.tolist(),
                }
                for i, vector in enumerate(vectors)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return {"object": "list", "data": data, "model": self.name, "usage": usage}

        kind = "ids" if isinstance(values[0], list) else "texts"
        return Work(kind, values, fields.flag("truncate"), answer)

    def _values(self, fields: Fields) -> list[Any]:
        given = fields.body.get("input")
        one = isinstance(given, str) or (
            isinstance(given, list) and bool(given) and not isinstance(given[0], str | list)
        )
        values = fields.several("input", [given] if one else given)
        if all(isinstance(value, str) for value in values):
            return values
        vocabulary = self.embedder.model.config.vocab_size
        for value in values:
            if not isinstance(value, list) or not value:
                raise Refused(
                    400,
                    "input: expected a text, a list of texts, token ids or a list of those, none "
                    "of them empty lists",
                    "input",
                )
            for token in value:
                if type(token) is not int or not 0 <= token < vocabulary:
                    raise Refused(
                        400,
                        f"input: expected token ids from 0 to {vocabulary - 1:,}, got another",
                        "input",
                    )
        return values

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        if key == "texts":
            return self.embedder.encode(
                list(values), batch_tokens=self.batch_tokens, show_progress_bar=False
            )
        limit = self.embedder.max_length
        return self.embedder.encode_ids([v[:limit] for v in values], self.batch_tokens, False)

    def warm_up(self, tokens: Sequence[int]) -> None:
        self.embedder.warm_up(tokens)


class Classify(Endpoint):
    """POST /classify: the labels of texts or of pairs of texts."""

    path: str = "/classify"
    param: str = "inputs"

    def __init__(self, pipe: TextClassification, name: str):
        self.pipe, self.name = pipe, name
        self.counter = Counter(pipe.tokenizer, pipe.max_length)

    def read(self, body: dict[str, Any]) -> Work:
        fields = Fields(body, {"inputs", "top_k", "truncate"}, self.name)
        given = body.get("inputs")
        single = isinstance(given, str | dict)
        items = fields.several("inputs", [given] if single else given)
        top_k = fields.number("top_k", 1, self.pipe.model.config.num_labels)

        def answer(results: list[Any], tokens: int) -> Any:
            labels = [result[:top_k] for result in results]
            return labels[0] if single else labels

        values = [self._value(item) for item in items]
        return Work("pairs", values, fields.flag("truncate"), answer)

    def _value(self, item: Any) -> Any:
        if isinstance(item, str):
            return item
        if isinstance(item, dict) and set(item) == {"text", "text_pair"}:
            pair = item["text"], item["text_pair"]
            if isinstance(pair[0], str) and isinstance(pair[1], str):
                return pair
        raise Refused(
            400, 'inputs: expected texts or pairs {"text": ..., "text_pair": ...}', "inputs"
        )

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        items = [
            value if isinstance(value, str) else {"text": value[0], "text_pair": value[1]}
            for value in values
        ]
        return self.pipe(items, top_k=None, truncation=True, show_progress_bar=False)

    def warm_up(self, tokens: Sequence[int]) -> None:
        self.pipe.warm_up(tokens)


class Rerank(Endpoint):
    """POST /rerank, as Cohere's (`documents`) and text-embeddings-inference's (`texts`)."""

    path: str = "/rerank"
    param: str = "documents"

    def __init__(self, reranker: Reranker, name: str):
        self.reranker, self.name = reranker, name
        prompt = resolve_prompt(
            reranker.ranking.prompts, reranker.ranking.default_prompt_name, None, None
        )
        self.counter = Counter(reranker.tokenizer, reranker.max_length, prompt)

    def read(self, body: dict[str, Any]) -> Work:
        known = {"query", "documents", "texts", "top_n", "return_documents", "truncate"}
        fields = Fields(body, known, self.name)
        query = body.get("query")
        if not isinstance(query, str):
            raise Refused(400, "query: expected a text", "query")
        if ("documents" in body) == ("texts" in body):
            raise Refused(400, "documents, texts: expected one of them", "documents")
        field = "documents" if "documents" in body else "texts"
        documents = [
            item["text"] if isinstance(item, dict) and set(item) == {"text"} else item
            for item in fields.several(field, body[field])
        ]
        if not all(isinstance(document, str) for document in documents):
            raise Refused(400, f'{field}: expected texts or objects {{"text": ...}}', field)
        top_n = fields.number("top_n", 1)
        with_documents = fields.flag("return_documents")

        def answer(results: list[Any], tokens: int) -> Any:
            scores = [float(score) for score in self.scores(results)]
            order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_n]
            if field == "texts":
                return [
                    {"index": i, "score": scores[i]}
                    | ({"text": documents[i]} if with_documents else {})
                    for i in order
                ]
            found = [
                {"index": i, "relevance_score": scores[i]}
                | ({"document": {"text": documents[i]}} if with_documents else {})
                for i in order
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return {"results": found, "model": self.name, "usage": usage}

        values = self.values(query, documents)
        return Work("pairs", values, fields.flag("truncate"), answer)

    def values(self, query: str, documents: Sequence[Any]) -> list[Any]:
        """Returns what is computed for a request."""
        return [(query, document) for document in documents]

    def scores(self, results: Sequence[Any]) -> Sequence[Any]:
        """Returns the score of each document from what was computed."""
        return results

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        return list(self.reranker.predict(values, show_progress_bar=False))

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Nothing: /classify compiles the programs that both run."""


class RerankVectors(Rerank):
    """POST /rerank by MaxSim. Values are (whether it is the query, text), results their vectors."""

    def __init__(self, embedder: MultiVectorEmbedder, name: str, batch_tokens: int):
        self.embedder, self.name, self.batch_tokens = embedder, name, batch_tokens
        colbert = embedder.colbert
        # The fields of a request, and what each counts: a prefix is a token of its own.
        self._sides = {
            "query": (True, colbert.query_length, bool(colbert.query_prefix)),
            self.param: (False, colbert.document_length, bool(colbert.document_prefix)),
        }
        self._counters = {
            field: Counter(embedder.tokenizer, length - prefix, embedder.prompt(query))
            for field, (query, length, prefix) in self._sides.items()
        }

    def values(self, query: str, documents: Sequence[Any]) -> list[Any]:
        return [(True, query), *((False, document) for document in documents)]

    def scores(self, results: Sequence[Any]) -> Sequence[Any]:
        return self.embedder.similarity(results[:1], results[1:])[0]

    def count(self, work: Work) -> tuple[list[int], int]:
        rooms: list[int] = []
        total = 0
        for field, (query, length, prefix) in self._sides.items():  # the query, then documents
            texts = [text for is_query, text in work.values if is_query == query]
            part = dataclasses.replace(work, values=texts)
            lengths, tokens = self._counters[field].tokens(part, field)
            total += tokens + prefix * len(texts)
            expanded = query and self.embedder.colbert.do_query_expansion
            rooms += [length if expanded else tokens + prefix for tokens in lengths]
        return rooms, total

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        found: list[Any] = [None] * len(values)
        for query in (True, False):
            numbers = [i for i, (is_query, _) in enumerate(values) if is_query == query]
            vectors = self.embedder.encode(
                [values[i][1] for i in numbers], is_query=query, batch_tokens=self.batch_tokens,
                show_progress_bar=False,
            )  # fmt: skip
            for i, vectors_LE in zip(numbers, vectors, strict=True):
                found[i] = vectors_LE
        return found

    def warm_up(self, tokens: Sequence[int]) -> None:
        self.embedder.warm_up(tokens)


class Fill(Endpoint):
    """POST /fill-mask: the most probable tokens at each mask."""

    path: str = "/fill-mask"
    param: str = "inputs"

    def __init__(self, pipe: FillMask, name: str):
        self.pipe, self.name = pipe, name
        self.counter = Counter(pipe.tokenizer, pipe.longest)

    def read(self, body: dict[str, Any]) -> Work:
        fields = Fields(body, {"inputs", "top_k", "targets"}, self.name)
        given = body.get("inputs")
        texts = fields.several("inputs", [given] if isinstance(given, str) else given)
        mask = str(self.pipe.tokenizer.mask_token)
        if not all(isinstance(text, str) and mask in text for text in texts):
            raise Refused(400, f"inputs: expected texts with {mask} in place of a word", "inputs")
        top_k = fields.number("top_k", 1, min(1000, self.pipe.model.config.vocab_size))
        targets = body.get("targets")
        if targets is not None:
            targets = fields.several("targets", [targets] if isinstance(targets, str) else targets)
            if not all(isinstance(target, str) and target.strip() for target in targets):
                raise Refused(400, "targets: expected words", "targets")
        key = top_k or self.pipe.top_k, targets and tuple(targets)
        single = isinstance(given, str)
        return Work(key, texts, False, lambda found, tokens: found[0] if single else found)

    def count(self, work: Work) -> tuple[list[int], int]:
        return self.counter.tokens(work, self.param, masks=True)

    def run(self, key: Any, values: Sequence[Any]) -> Sequence[Any]:
        top_k, targets = key
        targets = targets and list(targets)
        found = self.pipe(list(values), top_k=top_k, targets=targets, show_progress_bar=False)
        return [found] if len(values) == 1 else found  # as transformers, it unpacks a list of one

    def warm_up(self, tokens: Sequence[int]) -> None:
        self.pipe.warm_up(tokens)


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a request. Each method returns a checked one, or raises Refused."""

    body: Mapping[str, Any]
    known: set[str]
    model: str

    def __post_init__(self) -> None:
        # OpenAI's clients send `user`, which identifies a person to a provider.
        for name in self.body:
            if name not in self.known | {"model", "user"}:
                expected = ", ".join(sorted(self.known | {"model"}))
                got = name if name.isidentifier() and len(name) <= 40 else "another one"
                raise Refused(400, f"expected the fields {expected}, got {got}")
        given = self.body.get("model", self.model)
        if given != self.model:
            raise Refused(
                404, f"model: expected {self.model}, got another name", "model", "model_not_found"
            )

    def several(self, name: str, given: Any) -> list[Any]:
        """Returns a list that is neither empty nor longer than MAX_TEXTS."""
        if not isinstance(given, list) or not given:
            raise Refused(400, f"{name}: expected a text or a list of texts, not empty", name)
        if len(given) > MAX_TEXTS:
            raise Refused(
                413, f"{name}: expected at most {MAX_TEXTS:,} texts, got {len(given):,}", name
            )
        return given

    def number(self, name: str, least: int, most: int | None = None) -> int | None:
        """Returns a whole number from `least` to `most`, None if the field is missing or null."""
        given = self.body.get(name)
        if given is None:
            return None
        if type(given) is not int or given < least or (most is not None and given > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"
            raise Refused(400, f"{name}: expected a whole number {limits}", name)
        return given

    def flag(self, name: str) -> bool:
        """Returns a boolean, by default False."""
        given = self.body.get(name, False)
        if not isinstance(given, bool):
            raise Refused(400, f"{name}: expected true or false", name)
        return given

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Returns one of the choices, by default the first."""
        given = self.body.get(name, choices[0])
        if given not in choices:
            raise Refused(400, f"{name}: expected {' or '.join(choices)}", name)
        return given


TASKS = ("embed", "fill-mask", "text-classification")
PATHS = (Embeddings.path, Rerank.path, Classify.path, Fill.path)


def task_of(cls: type) -> str:
    """Returns the task that a checkpoint of this class is served for.

    Raises ValueError for a class that no endpoint answers.
    """
    tasks = {
        ModernBertModel: "embed",
        ModernBertForMaskedLM: "fill-mask",
        ModernBertForSequenceClassification: "text-classification",
    }
    if cls not in tasks:
        expected = ", ".join(known.__name__ for known in tasks)
        raise ValueError(f"model: expected a checkpoint of {expected}, got a {cls.__name__}")
    return tasks[cls]


def endpoints_of(
    runner: Embedder | FillMask | MultiVectorEmbedder | TextClassification,
    name: str,
    batch_tokens: int,
    reranker: Reranker | None = None,
):
    """Returns the endpoints that a runner answers, and for each other path why it does not.

    name: of the model, in answers. reranker: of the same checkpoint, if it has one label.
    """
    if isinstance(runner, Embedder):
        sentence = runner.sentence
        prompt = resolve_prompt(sentence.prompts, sentence.default_prompt_name, None, None)
        found: list[Endpoint] = [Embeddings(runner, name, batch_tokens, prompt)]
    elif isinstance(runner, MultiVectorEmbedder):
        found = [RerankVectors(runner, name, batch_tokens)]
    elif isinstance(runner, FillMask):
        found = [Fill(runner, name)]
    else:
        found = [Classify(runner, name)]
        if reranker is not None:
            found.append(Rerank(reranker, name))
    here = [endpoint.path for endpoint in found]
    kind = type(runner.model).__name__
    if isinstance(runner, Embedder | MultiVectorEmbedder):
        kind = "embeddings" if isinstance(runner, Embedder) else "a vector per token"
    served = f"this model ({kind}) answers {' and '.join(here)}"
    missing = {path: f"{path}: {served}" for path in PATHS if path not in here}
    if Rerank.path in missing and isinstance(runner, TextClassification):
        labels = runner.model.config.num_labels
        missing[Rerank.path] = f"{Rerank.path}: a reranker has one label, this model has {labels}"
    return found, missing
