"""Trains a byte-level BPE tokenizer like ModernBERT's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from modernbert_jax.tokenizer import from_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Ids 0 to 4. [MASK] includes the space before it, so that "is [MASK]." predicts " Paris".
SPECIAL_TOKENS = (
    AddedToken("[UNK]", special=True, normalized=False),
    AddedToken("[CLS]", special=True, normalized=False),
    AddedToken("[SEP]", special=True, normalized=False),
    AddedToken("[PAD]", special=True, normalized=False),
    AddedToken("[MASK]", special=True, normalized=False, lstrip=True),
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
# A word that occurs in fewer documents, such as a patient's name, is left out of the training.
FEWEST_DOCUMENTS = 10
# Where the byte-level pre-tokenizer begins a word, whatever is before and after it.
_APART = re.compile(r"(?<=[!-~])(?= [!-~])")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE with ModernBERT's normalizer, pre-tokenizer and special tokens.

    Only words that occur in at least `fewest_documents` of the texts are trained on, so that a
    token never has more letters of a rare word, such as a name, than frequent words give. The same
    texts give the same tokenizer. The vocabulary has `vocab_size` tokens, or fewer if the texts
    allow no more merges. Raises ValueError below 261 (5 special tokens and 256 bytes).
    Source: the tokenizer.json of answerdotai/ModernBERT-base.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be {SMALLEST_VOCABULARY} or more, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    normalizer = normalizers.NFC()
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # The words come normalized and split, so the backend must not do either yet.
    backend.train_from_iterator(_frequent_words(texts, normalizer, pre_tokenizer), trainer)
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return from_backend(backend)


def fewest_documents(documents: int) -> int:
    """The number of documents that a word must occur in: 10, or a tenth of fewer than 100.

    It is at least 2, except for a single document, which has no other to compare with.
    """
    return min(FEWEST_DOCUMENTS, max(2, -(-documents // 10)), max(documents, 1))


def _frequent_words(
    texts: Iterable[str],
    normalizer: normalizers.Normalizer,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
) -> Iterator[str]:
    """Yields each pre-tokenized word of enough documents, as often as it occurs."""
    count, occurrences, documents = 0, Counter[str](), Counter[str]()
    known: dict[str, list[str]] = {}  # the words of short parts of texts, which recur
    for text in texts:
        in_text = Counter[str]()
        for part, number in Counter(_APART.split(normalizer.normalize_str(text))).items():
            words = known.get(part)
            if words is None:
                words = [word for word, _ in pre_tokenizer.pre_tokenize_str(part)]
                if len(part) <= 32:
                    known[part] = words
            for word in words:
                in_text[word] += number
        occurrences.update(in_text)
        documents.update(in_text.keys())
        count += 1
    least = fewest_documents(count)
    for word, number in occurrences.items():
        if documents[word] >= least:
            yield from repeat(word, number)
