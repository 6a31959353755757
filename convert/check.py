"""The parity certificate: this model and transformers' on the same inputs, layer by layer."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, __version__, heads, pool
from modernbert_jax.checkpoint import hf, hub, orbax
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.weights import to_hf

from . import files

PACKAGES = ("jax", "flax", "numpy", "torch", "transformers")
SEED = 0

# The published values of one checkpoint: "Hello World!", the first three positions and values.
# Source: the integration tests of transformers (float32, SDPA), to 1e-4.
GOLDEN_ID = "answerdotai/ModernBERT-base"
GOLDEN_TEXT, GOLDEN_TOLERANCE = "Hello World!", 1e-4
GOLDEN_LOGITS = (
    (3.8387, -0.2017, 12.2839),
    (3.6300, 0.6869, 14.7123),
    (-5.1137, -3.8122, 11.9874),
)
GOLDEN_HIDDEN = (
    (0.3151, -0.6417, -0.7027),
    (-0.7834, -1.5810, 0.4576),
    (1.0614, -0.7268, -0.0871),
)


def run(source: str, json_path: Path | None, tolerance: float) -> int:
    """Prints the table and writes the JSON; 0 where every error is within `tolerance`, else 1.

    source: an HF folder, an Orbax folder or a hub id. Raises ImportError where torch or
    transformers is absent (except for GOLDEN_ID, whose golden values need neither), ValueError or
    OSError for a checkpoint that cannot be read.
    """
    folder = hub.resolve(source)
    passed, certificate = True, {"source": source, "tolerance": tolerance, "seed": SEED}
    if source == GOLDEN_ID:
        certificate["golden"] = _golden(folder)
        passed = certificate["golden"]["passed"]
    lacking = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if lacking and source != GOLDEN_ID:
        raise ImportError(
            f"check compares with transformers in torch; not installed: {', '.join(lacking)}"
        )
    if lacking:
        print(f"not compared with transformers: {', '.join(lacking)} not installed")
    else:
        certificate |= _compare(folder, tolerance)
        passed = passed and certificate["passed"]
    certificate |= {"passed": passed, "versions": _versions()}
    if json_path is not None:
        json_path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _compare(folder: Path, tolerance: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = files.load(str(folder))
        cls, config, params = checkpoint.cls, checkpoint.config, checkpoint.params
        if orbax.is_orbax(folder):  # transformers needs a folder that it can read
            folder = Path(scratch)
            tensors = hf.params_to_hf(cls, config, params)
            hf.write_hf(folder, config, tensors, architecture=cls.__name__)
        hashes = {"config_sha256": _config_hash(config), "weights_sha256": _hash(config, params)}
        theirs = _their_model(cls.__name__, folder)
        config = config.replace(dtype="float32", param_dtype="float32", residual_dtype="float32")
        ours = module_of(cls, config, {k: jnp.asarray(v, jnp.float32) for k, v in params.items()})
    inputs = dict(_inputs(config))
    print(f"{cls.__name__}, {sum(v.size for v in params.values()):,} parameters, in float32")
    errors: dict[str, dict[str, float]] = {}
    for name, (ids, mask) in inputs.items():
        reference = _their_values(theirs, cls, ids, mask)
        for row, value in _our_values(ours, cls, ids, mask).items():
            errors.setdefault(row, {})[name] = _error(value, reference[row], mask)
    worst = max(e for row in errors.values() for e in row.values())
    passed = worst <= tolerance
    _print_table(errors, list(inputs), config)
    print(f"largest relative error {worst:.2e}, tolerance {tolerance:.0e}")
    return {
        "model": cls.__name__,
        **hashes,
        "inputs": {name: list(ids.shape) for name, (ids, _) in inputs.items()},
        "errors": {
            row: {k: e if np.isfinite(e) else None for k, e in by.items()}
            for row, by in errors.items()
        },
        "worst": worst if np.isfinite(worst) else None,
        "passed": passed,
    }


def _inputs(config: ModernBertConfig) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """name -> (ids_BL, mask_BL)."""
    rng = np.random.default_rng(SEED)

    def make(*spans: tuple[int, int], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, config.vocab_size, (len(spans), length))
        mask = np.stack([(np.arange(length) >= a) & (np.arange(length) < b) for a, b in spans])
        return np.where(mask, ids, config.pad_token_id or 0), mask.astype(np.int64)

    yield "plain", make((0, 16), (0, 16), length=16)
    yield "padded right", make((0, 40), (0, 23), length=40)
    yield "padded left", make((0, 40), (17, 40), length=40)
    length = 2 * config.window + 37  # some keys are out of reach on both sides
    yield "long", make((0, length), length=length)


def _our_values(model: Any, cls: type, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    encoder = getattr(model, "model", model)
    norm, last = encoder.final_norm, []

    def keep(x_BLD):  # hidden_states end, as those of transformers, after the final norm
        last.append(x_BLD)
        return norm(x_BLD)

    encoder.final_norm = keep
    try:
        out = encoder(ids, mask, output_hidden_states=True)
    finally:
        encoder.final_norm = norm
    embeddings, *layers, hidden = out.hidden_states
    values = {"embeddings": embeddings}
    values |= {f"layer {i}": x for i, x in enumerate([*layers, *last])}
    values["final_norm"] = hidden
    if cls is heads.ModernBertForMultipleChoice:
        values["logits"] = model(ids[None], mask[None]).logits
    elif cls is heads.ModernBertForSequenceClassification:
        pooled = pool(hidden, jnp.asarray(mask), 1, model.config.classifier_pooling)[:, 0]
        values |= {"head": model.head(pooled), "logits": model(ids, mask).logits}
    elif cls is heads.ModernBertForQuestionAnswering:
        spans = model(ids, mask)
        logits = jnp.stack([spans.start_logits, spans.end_logits], axis=-1)
        values |= {"head": model.head(hidden), "logits": logits}
    elif encoder is not model:
        values |= {"head": model.head(hidden), "logits": model(ids, mask).logits}
    return {name: np.asarray(value) for name, value in values.items()}


def _their_model(name: str, folder: Path) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, name).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{folder}: transformers reports {kind}: {sorted(report[kind])[:5]}")
    return model.eval()


def _their_values(
    model: Any, cls: type, ids: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    import torch

    values: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            values[name] = first.detach().numpy().copy()

        return hook

    encoder = getattr(model, "model", model)
    modules = {"embeddings": encoder.embeddings, "final_norm": encoder.final_norm}
    modules |= {f"layer {i}": layer for i, layer in enumerate(encoder.layers)}
    if encoder is not model:
        modules["head"] = model.head
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    tensors = torch.from_numpy(ids), torch.from_numpy(mask)
    if cls is heads.ModernBertForMultipleChoice:
        tensors = tuple(t[None] for t in tensors)
    try:
        with torch.no_grad():
            out = model(input_ids=tensors[0], attention_mask=tensors[1])
    finally:
        for handle in handles:
            handle.remove()
    if cls is heads.ModernBertForQuestionAnswering:
        values["logits"] = torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    elif encoder is not model:
        values["logits"] = out.logits.numpy()
    return values


def _error(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    """Largest error relative to the reference's largest value, where a token is; inf for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.shape[:2] == mask.shape:
        ours, theirs = ours[mask == 1], theirs[mask == 1]
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny)
    return float(error) if np.isfinite(error) else float("inf")


def _print_table(
    errors: Mapping[str, Mapping[str, float]], inputs: list[str], config: ModernBertConfig
) -> None:
    print(f"{'':12} {'kind':>18} " + " ".join(f"{name:>12}" for name in inputs))
    for row, by in errors.items():
        kind = config.layer_types[int(row.split()[1])] if row.startswith("layer ") else ""
        print(f"{row:12} {kind:>18} " + " ".join(f"{by[name]:12.2e}" for name in inputs))


def _golden(folder: Path) -> dict[str, Any]:
    """The published values of GOLDEN_ID against this model; needs no torch."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(GOLDEN_TEXT).ids
    model = ModernBertForMaskedLM.from_pretrained(folder, dtype="float32")
    ids_BL = np.asarray([ids])
    found = {
        "logits": (model(ids_BL).logits, GOLDEN_LOGITS),
        "hidden": (model.model(ids_BL).last_hidden_state, GOLDEN_HIDDEN),
    }
    result: dict[str, Any] = {"text": GOLDEN_TEXT, "tolerance": GOLDEN_TOLERANCE, "passed": True}
    for name, (values, golden) in found.items():
        values, golden = np.asarray(values)[0, :3, :3], np.asarray(golden)
        # Absolute and relative, as the tests that they come from.
        close = np.allclose(values, golden, atol=GOLDEN_TOLERANCE, rtol=GOLDEN_TOLERANCE)
        error = float(np.abs(values - golden).max()) if values.shape == golden.shape else None
        result[name] = error
        result["passed"] = bool(result["passed"] and close)
        print(f"golden {name}: largest error {error}, {'passed' if close else 'FAILED'}")
    return result


def _config_hash(config: ModernBertConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _hash(config: ModernBertConfig, params: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of HF's tensors in the order of their keys: key, dtype, shape, bytes.

    The same for a checkpoint in every form.
    """
    digest = hashlib.sha256()
    for key in sorted(params):
        tensor = to_hf(key, params[key])
        digest.update(f"{key} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "modernbert_jax": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
