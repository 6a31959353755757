"""The moments of StableAdamW in Composer's checkpoints. Source: torch-optimi, composer.optim."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from modernbert_jax.weights import DECODER, EMBEDDING

from . import composer

OPTIMIZER = "StableAdamW"
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(checkpoint: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Returns (step, exp_avg, exp_avg_sq) of StableAdamW; moments under Hugging Face's keys.

    The state is keyed by name or by number. Numbers follow the parameter groups: one group of all
    parameters, or two groups in either order, of which one holds norms and biases. The step is in
    the state or in the groups. Raises ValueError for another optimizer and for entries that are
    missing or ambiguous.
    """
    optimizers = composer.child(checkpoint, "state", "optimizers")
    if not isinstance(optimizers, dict) or not optimizers:
        raise ValueError("the checkpoint holds no optimizer: leave out --optimizer")
    if list(optimizers) != [OPTIMIZER]:
        raise ValueError(
            f"optimizers: expected {OPTIMIZER}, got {', '.join(map(str, optimizers))}; the moments "
            "of others are scaled differently (leave out --optimizer)"
        )
    optimizer = optimizers[OPTIMIZER]
    state, groups = (composer.child(optimizer, name) for name in ("state", "param_groups"))
    if not isinstance(state, dict) or not state or not isinstance(groups, list):
        raise ValueError(f"optimizers[{OPTIMIZER!r}]: expected state and param_groups")
    for key, entry in state.items():
        for moment in MOMENTS:
            if not isinstance(composer.child(entry, moment), np.ndarray):
                raise ValueError(f"optimizers[{OPTIMIZER!r}]: {key} has no {moment}")
    if all(isinstance(key, int) for key in state):
        names = _names_of_numbers(checkpoint, state, groups)
        state = {names[number]: entry for number, entry in state.items()}
    elif not all(isinstance(key, str) for key in state):
        raise ValueError(f"optimizers[{OPTIMIZER!r}]: expected names or numbers as keys, got both")
    entries = composer.to_hf_keys(state)
    if composer.is_tied(checkpoint) and DECODER in entries:  # either name of the tied embedding
        if EMBEDDING in entries:
            raise ValueError(f"optimizer: {EMBEDDING} is set twice, also as the tied {DECODER}")
        entries[EMBEDDING] = entries.pop(DECODER)
    mu, nu = ({key: entry[m] for key, entry in entries.items()} for m in MOMENTS)
    return _step([*state.values(), *groups]), mu, nu


def _names_of_numbers(checkpoint: Any, state: Mapping, groups: list) -> dict[int, str]:
    """Composer's name for each parameter number."""
    if not all(isinstance(composer.child(g, "params"), list) for g in groups):
        raise ValueError("optimizer groups: expected the list of their parameters")
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) != len(numbers) or set(numbers) != set(state):
        raise ValueError(
            f"optimizer: expected moments of the {len(numbers)} parameters in its groups, got "
            f"those of {len(state)}"
        )
    model = dict(composer.model_of(checkpoint))
    if composer.is_tied(checkpoint):
        model.pop("model.decoder.weight", None)
    if all("param_names" in g for g in groups):
        named = [g["param_names"] for g in groups]
    elif len(groups) == 1:
        named = [list(model)]
    elif len(groups) == 2:
        is_small = [{state[n]["exp_avg"].ndim <= 1 for n in g["params"]} for g in groups]
        if is_small not in ([{True}, {False}], [{False}, {True}]):
            raise ValueError(
                "optimizer groups: expected one of norms and biases and one of the other weights, "
                "got two that mix them: the numbers cannot be given names"
            )
        named = [[k for k, v in model.items() if {v.ndim <= 1} == small] for small in is_small]
    else:
        raise ValueError(f"optimizer groups: expected one or two, got {len(groups)}")
    names = {}
    for group, keys in zip(groups, named, strict=True):
        if len(group["params"]) != len(keys):
            raise ValueError(
                f"optimizer group: expected {len(keys)} parameters, got {len(group['params'])}"
            )
        names.update(zip(group["params"], keys, strict=True))
    return names


def _step(entries: list[Mapping[str, Any]]) -> int:
    found = {float(np.asarray(e["step"]).reshape(())) for e in entries if "step" in e}
    if len(found) != 1:
        raise ValueError(f"optimizer: expected one step, got {sorted(found) or 'none'}")
    (step,) = found
    if step != int(step) or step < 0:
        raise ValueError(f"optimizer: expected a non-negative integer step, got {step}")
    return int(step)


def write_moments(
    step: int,
    mu: Mapping[str, np.ndarray],
    nu: Mapping[str, np.ndarray],
    *,
    lr: float,
    weight_decay: float,
) -> dict[str, Any]:
    """Returns Composer's state -> optimizers for moments under Hugging Face's keys, keyed by name.

    lr, weight_decay: values of the groups, which Composer's restart_override replaces. The rest is
    the recipe's: betas (0.9, 0.98), eps 1e-6, and a first group without decay for norms and biases.
    """
    mu, nu = composer.to_composer_keys(mu), composer.to_composer_keys(nu)
    eps = 1e-6
    common = {
        "lr": lr,
        "initial_lr": lr,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": eps,
        "decouple_lr": True,
        "max_lr": lr,
        "kahan_sum": None,
        "foreach": True,
        "gradient_release": False,
        "setup": True,
        "step": np.asarray(step, np.int32),
    }
    groups = [
        {"params": [k for k, v in mu.items() if v.ndim <= 1], "weight_decay": 0.0},
        {"params": [k for k, v in mu.items() if v.ndim > 1], "weight_decay": weight_decay},
    ]
    state = {
        key: {
            "exp_avg": mu[key],
            "exp_avg_sq": nu[key],
            "eps_sq": np.asarray(eps**2, mu[key].dtype),
            "kahan_comp": None,
        }
        for key in mu
    }
    return {OPTIMIZER: {"state": state, "param_groups": [g | common for g in groups]}}
