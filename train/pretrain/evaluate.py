"""Evaluation: loss and accuracy over masked tokens of the evaluation sets of a phase."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from modernbert_jax.packing import IGNORE_INDEX

from ..common.hosts import first_then_others, total
from ..tokens.store import TokenStore, joined
from .config import TrainConfig
from .corpora import open_corpus
from .data import eval_batches
from .masking import Masking
from .step import Trainer


class Evaluation:
    """The evaluation sets of one phase, masked once and kept in memory.

    stores: {name of a corpus: its evaluation split}; empty ones are left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        masking: Masking,
        stores: Mapping[str, TokenStore],
    ):
        self.trainer, self.masking = trainer, masking
        slots = trainer.local_slots()
        self.batches = {
            name: eval_batches(store, masking, config, slots)
            for name, store in stores.items()
            if len(store.lengths)
        }

    def __call__(self, params: Mapping[str, jax.Array]) -> dict[str, float]:
        """Returns {"loss" (nats), "accuracy"} over all sets, and for each "NAME/loss", ..."""
        sums = {name: self._sums(params, batches) for name, batches in self.batches.items()}
        scores = _means(sum(sums.values(), np.zeros(3)))
        if len(sums) > 1:
            for name, part in sums.items():
                scores |= {f"{name}/{key}": value for key, value in _means(part).items()}
        return scores

    def _sums(self, params: Mapping[str, jax.Array], batches: list[dict[str, Any]]) -> np.ndarray:
        """Returns [sum of losses, correct predictions, masked tokens], float64."""
        sums = np.zeros(3)
        for batch in batches:
            arrays = self.trainer.to_devices({name: array[None] for name, array in batch.items()})
            sums += [float(x) for x in self.trainer.eval_step(params, arrays)]
        return sums

    def unigram_accuracy(self, train: TokenStore) -> float:
        """Returns the accuracy of always predicting the commonest token of the training text."""
        counts = train.counts(self.masking.vocab_size)
        if not self.masking.mask_special:
            counts[list(self.masking.special_ids)] = 0
        batches = [batch for part in self.batches.values() for batch in part]
        labels = np.concatenate([batch["labels"].ravel() for batch in batches])
        correct, count = total([(labels == counts.argmax()).sum(), (labels != IGNORE_INDEX).sum()])
        return float(correct / max(count, 1.0))  # a small set may have no masked token


def general_evaluation(
    config: TrainConfig, trainer: Trainer, masking: Masking, workdir: Any
) -> Evaluation | None:
    """Returns the evaluation of --general-text; None without one."""
    general = config.general_text
    if general is None:
        return None
    parts = first_then_others("general", lambda: open_corpus(config, workdir, general))
    store = joined([part for part in parts.values() if len(part.lengths)])
    return Evaluation(config, trainer, masking, {"general": store})


def _means(sums: np.ndarray) -> dict[str, float]:
    loss, correct, count = (float(x) for x in sums)
    return {"loss": loss / max(count, 1.0), "accuracy": correct / max(count, 1.0)}
