"""What the settings of several commands have in common."""

from collections.abc import Sequence
from typing import Any

from modernbert_jax.lora import check_lora

LORA_ALPHA, LORA_TARGETS = 16.0, ("Wqkv", "Wo", "Wi")


def check_set(**names: str | None) -> None:
    """Raises ValueError for a setting that is an empty text: None means unset."""
    for name, value in names.items():
        if value == "":
            raise ValueError(f"{name}: expected a name, got an empty one; None means unset")


def check_adapters(config: Any) -> None:
    """Raises ValueError for lora_rank, lora_alpha and lora_targets that do not go together."""
    if config.lora_rank is not None:
        check_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    elif (config.lora_alpha, config.lora_targets) != (LORA_ALPHA, LORA_TARGETS):
        raise ValueError("lora_alpha, lora_targets: expected lora_rank as well, got None")


def adapters_in_words(rank: int, alpha: float, targets: Sequence[str]) -> str:
    """Returns what a model card says about adapters."""
    return (
        f"LoRA of rank {rank} and alpha {alpha:g} in {', '.join(targets)}, merged into the weights"
    )
