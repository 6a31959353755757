"""Trains a byte-level BPE tokenizer like ModernBERT's."""

from __future__ import annotations

from collections.abc import Iterable
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


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE with ModernBERT's normalizer, pre-tokenizer and special tokens.

    The same texts give the same tokenizer. The vocabulary has `vocab_size` tokens, or fewer if
    the texts allow no more merges. Raises ValueError below 261 (5 special tokens and 256 bytes).
    Source: the tokenizer.json of answerdotai/ModernBERT-base.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be {SMALLEST_VOCABULARY} or more, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return from_backend(backend)
