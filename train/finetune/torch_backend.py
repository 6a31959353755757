"""Fine-tuning any model of transformers in torch, in padded batches, under the same harness."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from modernbert_jax.packing import IGNORE_INDEX
from modernbert_jax.tokenizer import AutoTokenizer, max_tokens

from ..common.workdir import start_folder
from .config import FinetuneConfig
from .encode import Encoded
from .tasks.task import KIND


class TorchBackend:
    """The tokenizer and the class of the model; each run reads the checkpoint anew."""

    def __init__(self, config: FinetuneConfig, kind: KIND, labels: Sequence[str]):
        import transformers

        self.kind, self.labels = kind, len(labels) or 2
        name = {"tokens": "TokenClassification", "qa": "QuestionAnswering"}.get(
            kind, "SequenceClassification"
        )
        self.cls = getattr(transformers, f"AutoModelFor{name}")
        model_config = transformers.AutoConfig.from_pretrained(config.model)
        # transformers 5 ignores add_prefix_space for ModernBERT's tokenizer; ours does not.
        if model_config.model_type == "modernbert":
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                start_folder(config.model), add_prefix_space=True
            )
            self.max_length = model_config.max_position_embeddings
        else:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                config.model, add_prefix_space=True
            )
            unset = 1_000_000
            longest = max_tokens(self.tokenizer, unset)
            self.max_length = longest if longest < unset else 512

    def start(self, config: FinetuneConfig, seed: int) -> "TorchModel":
        """The weights of the checkpoint and a new head, before the first step of a run."""
        return TorchModel(config, self, seed)


class TorchModel:
    """The weights and the optimizer state of one run."""

    def __init__(self, config: FinetuneConfig, backend: TorchBackend, seed: int):
        import torch

        self.torch, self.config, self.backend, self.kind = torch, config, backend, backend.kind
        torch.manual_seed(seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = backend.cls.from_pretrained(config.model, num_labels=backend.labels)
        self.model.to(self.device)
        if config.freeze_encoder:
            getattr(self.model, self.model.base_model_prefix).requires_grad_(False)
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                plain = name.endswith(".bias") or "norm" in name.lower()
                groups[plain]["params"].append(p)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def _inputs(self, batch: Sequence[Encoded]) -> tuple[Any, Any]:
        torch, B = self.torch, len(batch)
        length = max(len(e.input_ids) for e in batch)
        input_ids = np.full((B, length), self.backend.tokenizer.pad_token_id or 0)
        mask = np.zeros((B, length), np.int64)
        labels = np.full((B, length), IGNORE_INDEX)
        for row, e in enumerate(batch):
            n = len(e.input_ids)
            input_ids[row, :n], mask[row, :n] = e.input_ids, 1
            if self.kind == "tokens":
                labels[row, :n] = e.target
        if self.kind != "tokens":
            labels = np.asarray([e.target for e in batch])
        inputs = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
        inputs = {k: v.to(self.device) for k, v in inputs.items()}
        return inputs, torch.tensor(labels).to(self.device)

    def step(self, micro_batches: Sequence[Sequence[Encoded]], learning_rate: float) -> float:
        """Makes one optimizer step; returns the mean loss over its micro-batches."""
        torch, F = self.torch, self.torch.nn.functional
        self.model.train()
        total, count = 0.0, 0
        for batch in micro_batches:
            inputs, labels = self._inputs(batch)
            with torch.autocast(self.device, torch.bfloat16, self.config.dtype == "bfloat16"):
                logits = self._logits(inputs)
            if self.kind == "multilabel":
                loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
                count += labels.numel()
            else:
                loss = F.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), labels.reshape(-1),
                    ignore_index=IGNORE_INDEX, reduction="sum",
                )  # fmt: skip
                count += int((labels != IGNORE_INDEX).sum())
            loss.backward()
            total += loss.item()
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad /= max(count, 1)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / max(count, 1)

    def _logits(self, inputs: dict[str, Any]) -> Any:
        """In float32; for qa [B, 2, T] with -inf at padding."""
        out = self.model(**inputs)
        if self.kind != "qa":
            return out.logits.float()
        both = self.torch.stack([out.start_logits, out.end_logits], 1).float()
        return both.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)

    def predict(self, batch: Sequence[Encoded]) -> list[np.ndarray]:
        """The logits of each example: [labels], or [tokens, labels], or [tokens, 2] for qa."""
        self.model.eval()
        with self.torch.no_grad():
            logits = self._logits(self._inputs(batch)[0]).cpu().numpy()
        if self.kind in ("classification", "multilabel"):
            return list(logits)
        if self.kind == "qa":
            logits = logits.swapaxes(1, 2)
        return [row[: len(e.input_ids)] for row, e in zip(logits, batch, strict=True)]

    def weights(self) -> dict[str, Any]:
        """A copy of the weights on the host."""
        return {k: v.cpu().clone() for k, v in self.model.state_dict().items()}

    def load(self, weights: dict[str, Any]) -> None:
        """Sets the weights to a copy of these."""
        self.model.load_state_dict(weights)

    def save(self, weights: dict[str, Any], folder: pathlib.Path) -> None:
        """Writes weights and tokenizer as a Hugging Face folder."""
        self.load(weights)
        self.model.save_pretrained(folder)
        self.backend.tokenizer.save_pretrained(folder)
