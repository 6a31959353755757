"""What the settings of several commands have in common."""

from collections.abc import Mapping
from typing import Any

from modernbert_jax import ModernBertConfig, lora
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.lora import check_lora
from modernbert_jax.weights import is_adapter

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


def adapter_facts(config: Any) -> dict[str, str]:
    """Returns what a model card says about the adapters of a run; nothing without any."""
    if config.lora_rank is None:
        return {}
    what = f"LoRA of rank {config.lora_rank} and alpha {config.lora_alpha:g}"
    return {"Adapters": f"{what} in {', '.join(config.lora_targets)}, merged into the weights"}


def with_adapters(
    cls: type, model_config: ModernBertConfig, params: Mapping[str, Any], config: Any
) -> Any:
    """Builds the module around parameters and the factors of config's adapters; works under jit."""
    model = module_of(cls, model_config, params)
    if config.lora_rank is not None:
        factors = {path: value for path, value in params.items() if is_adapter(path)}
        lora.attach(model, factors, config.lora_alpha / config.lora_rank)
    return model
