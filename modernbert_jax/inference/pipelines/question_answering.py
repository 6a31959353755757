"""Question answering: the spans of a context that answer a question."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from modernbert_jax.heads import ModernBertForQuestionAnswering
from modernbert_jax.inference.export import whole_number
from modernbert_jax.inference.pipelines.base import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class QuestionAnswering(Pipeline):
    """`pipe(question="What is denied?", context="Denies fever.")`: the best span of the context.

    Results are those of transformers 4's QuestionAnsweringPipeline, which transformers 5 no longer
    has: {"score", "start", "end", "answer"}, with character offsets in the context. A context that
    does not fit beside the question is read in windows that overlap; probabilities are those within
    a window. Spans with the same text, in any case, are one answer whose score is their sum.
    """

    model_class: type = ModernBertForQuestionAnswering
    task: str = "question-answering"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        folder: str | os.PathLike[str] | None = None,
        *,
        batch_tokens: int | None = None,
    ):
        """Raises ValueError for a tokenizer that pads on the left: in transformers it would put the
        context first."""
        super().__init__(model, tokenizer, folder, batch_tokens=batch_tokens)
        if tokenizer.padding_side != "right":
            raise ValueError(
                f"tokenizer: expected padding_side right, got {tokenizer.padding_side}; set it to "
                "right, as the question is read before the context"
            )

    def _function(self):
        def logits(params, input_ids_BL, segment_ids_BL):
            out = self._build(params)(input_ids_BL, segment_ids=segment_ids_BL)
            return jnp.stack([out.start_logits, out.end_logits], axis=-1)

        return logits, ()

    def __call__(
        self,
        question: Any = None,
        context: str | Sequence[str] | None = None,
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Returns an answer, a list of them if there are several (top_k), or a list of either.

        question: a text or a list of texts, for one context or as many; or {"question", "context"},
        or a list of those. A list of one gives the result of that one, as in transformers. top_k:
        the most answers. max_answer_len: in tokens. max_seq_len: of a window in tokens, by default
        384, or the smaller of the model's and the tokenizer's limit. doc_stride: the tokens that
        windows share, by default 128, or half of a shorter window. handle_impossible_answer: adds
        the answer "", from 0 to 0, whose score is the least over the windows of the probability of
        the first token. align_to_words: extends an answer to whole words. Raises TypeError for what
        is no text, ValueError for an empty one and for a question that leaves no room in a window.
        """
        examples = _examples(question, context)
        top_k = whole_number("top_k", top_k, 1)
        longest = whole_number("max_answer_len", max_answer_len, 1)
        if max_seq_len is None:
            max_seq_len = min(384, self.max_length)
        max_seq_len = whole_number("max_seq_len", max_seq_len, 1, self.max_length)
        windows: list[list[Any]] = [
            self._windows(number, *example, max_seq_len, doc_stride)
            for number, example in enumerate(examples, start=1)
        ]
        ids = [window.ids for some in windows for window in some]
        logits: list[Any] = [None] * len(ids)
        for i, logits_L2 in self._by_token(ids, show_progress_bar):
            logits[i] = logits_L2
        results, first = [], 0
        for (_, text), some in zip(examples, windows, strict=True):
            answers: list[dict[str, Any]] = []
            nulls = []
            for window, logits_L2 in zip(some, logits[first:], strict=False):
                # Aligned to words, several spans may become one.
                count = 2 * top_k + 10 if align_to_words else top_k
                spans, null = best_spans(logits_L2, window.sequence_ids, count, longest)
                nulls.append(null)
                for start, end, score in spans:
                    _add(answers, text, *_characters(window, start, end, align_to_words), score)
            first += len(some)
            if handle_impossible_answer:
                answers.append({"score": min(nulls), "start": 0, "end": 0, "answer": ""})
            answers = sorted(answers, key=lambda answer: -answer["score"])[:top_k]
            results.append(answers[0] if len(answers) == 1 else answers)
        return results[0] if len(results) == 1 else results

    def _windows(
        self, number: int, question: str, context: str, max_seq_len: int, doc_stride: int | None
    ) -> list[Any]:
        """Returns the windows of a context as encodings of the tokenizers library."""
        tokens = self._tokens(question)
        room = max_seq_len - self.tokenizer.num_special_tokens_to_add(pair=True) - tokens
        if room < 1:
            raise ValueError(
                f"question: expected less than {tokens + room:,} tokens, to leave room for the "
                f"context, number {number} has {tokens:,}; shorten it"
            )
        stride = min(max_seq_len // 2, 128)
        if doc_stride is not None:
            stride = whole_number("doc_stride", doc_stride, 0)
        if stride >= room:
            if self._tokens(context) > room:
                raise ValueError(
                    f"doc_stride: expected less than the {room:,} tokens of the context in a "
                    f"window, got {stride:,}; pass a smaller one, or shorten question {number}"
                )
            stride = 0  # one window
        encoded: Any = self.tokenizer(
            question, context, truncation="only_second", max_length=max_seq_len, stride=stride,
            return_overflowing_tokens=True,
        )  # fmt: skip
        return encoded.encodings

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def best_spans(
    logits_L2: np.ndarray, sequence_ids: Sequence[int | None], count: int, max_answer_len: int
) -> tuple[list[tuple[int, int, float]], float]:
    """Returns the most probable spans of a window, and the probability that there is no answer.

    logits_L2: of the start and the end. sequence_ids: 1 at the tokens of the context. A span is
    (first token, last token, score), the best first; the score is the product of the probabilities
    of start and end, each a softmax over the context and the first token, which stands for no
    answer. Ties go to the earlier start, then to the earlier end.
    """
    at = np.array([0] + [n for n, sequence in enumerate(sequence_ids) if sequence == 1])
    x_P2 = logits_L2[at].astype(np.float64)
    p_P2 = np.exp(x_P2 - x_P2.max(0))
    p_P2 /= p_P2.sum(0)
    start_C, end_C = p_P2[1:, 0], p_P2[1:, 1]
    tokens, width = len(start_C), min(max_answer_len, len(start_C))
    ends_CW = np.arange(tokens)[:, None] + np.arange(width)
    padded = np.concatenate([end_C, np.full(width, -1.0)])  # no span ends beyond the window
    scores = (start_C[:, None] * padded[ends_CW]).reshape(-1)
    best = [n for n in np.argsort(-scores, kind="stable")[:count] if ends_CW.flat[n] < tokens]
    return [
        (int(at[1 + n // width]), int(at[1 + ends_CW.flat[n]]), float(scores[n])) for n in best
    ], float(p_P2[0].prod())


def _characters(window: Any, start: int, end: int, align_to_words: bool) -> tuple[int, int]:
    """Returns the characters of the context that the tokens of a span cover."""
    if align_to_words:
        words = window.token_to_word(start), window.token_to_word(end)
        if None not in words:  # a special token within the context is no part of a word
            return window.word_to_chars(words[0], 1)[0], window.word_to_chars(words[1], 1)[1]
    return window.offsets[start][0], window.offsets[end][1]


def _add(answers: list[dict[str, Any]], text: str, start: int, end: int, score: float) -> None:
    """Adds an answer, or its score to an earlier one with the same text."""
    answer = text[start:end]
    for found in answers:
        if found["answer"].lower() == answer.lower():
            found["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": answer})


def _examples(question: Any, context: Any) -> list[tuple[str, str]]:
    """Returns the pairs of a question and a context. Raises TypeError, or ValueError for none."""
    if context is None:
        items = [question] if isinstance(question, Mapping) else question
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise TypeError("context: expected a text beside the question, got none")
        items = list(items)
        for number, item in enumerate(items, start=1):
            if not isinstance(item, Mapping) or item.keys() != {"question", "context"}:
                raise TypeError(
                    'question: expected {"question": ..., "context": ...}, number '
                    f"{number} is another {type(item).__name__}"
                )
        pairs = [(item["question"], item["context"]) for item in items]
    else:
        questions = [question] if isinstance(question, str) else list(question or ())
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(questions) != len(contexts):
            raise ValueError(
                f"context: expected one, or {len(questions)} as there are questions, got "
                f"{len(contexts)}"
            )
        pairs = list(zip(questions, contexts, strict=True))
    if not pairs:
        raise ValueError("question: expected at least one, got none")
    for number, pair in enumerate(pairs, start=1):
        for name, text in zip(("question", "context"), pair, strict=True):
            if not isinstance(text, str):
                raise TypeError(
                    f"{name}: expected a text, number {number} is a {type(text).__name__}"
                )
            if not text:
                raise ValueError(f"{name}: expected a text, number {number} is empty")
    return pairs
