"""The parity report: this library and transformers on the same inputs, layer by layer."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM, __version__, heads, pool
from modernbert_jax.checkpoint import hf, hub, orbax
from modernbert_jax.checkpoint.params import module_of
from modernbert_jax.tokenizer_files import check_files
from modernbert_jax.weights import to_hf

from . import files

PACKAGES = ("jax", "flax", "numpy", "torch", "transformers")
SEED = 0

# Published values of one checkpoint: the first three positions and channels for "Hello World!".
# Source: the integration tests of transformers (float32, SDPA), exact to 1e-4.
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
    """Prints a parity report, also writes it as JSON, and returns 0 if it passed, else 1.

    source: a Hugging Face folder, an Orbax folder or a hub id. tolerance: the largest error that
    passes, relative to the largest value of the reference. Raises ImportError if torch or
    transformers is missing (except for GOLDEN_ID, whose published values need neither), ValueError
    or OSError if the checkpoint cannot be read.
    """
    folder = hub.resolve(source)
    report: dict[str, Any] = {"source": source, "tolerance": tolerance, "seed": SEED}
    passed = True
    if source == GOLDEN_ID:
        report["golden"] = _golden(folder)
        passed = report["golden"]["passed"]
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing and source != GOLDEN_ID:
        raise ImportError(
            f"check compares with transformers in torch; not installed: {', '.join(missing)}"
        )
    if missing:
        print(f"not compared with transformers: {', '.join(missing)} not installed")
    else:
        report |= _compare(folder, tolerance)
        passed = passed and report["passed"]
    report |= {"passed": passed, "versions": _versions()}
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _compare(folder: Path, tolerance: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = files.load(str(folder))
        cls, config, params = checkpoint.cls, checkpoint.config, checkpoint.params
        if orbax.is_orbax(folder):  # transformers reads only its own layout
            folder = Path(scratch)
            tensors = hf.params_to_hf(cls, config, params)
            hf.write_hf(folder, config, tensors, architecture=cls.__name__)
        hashes = {"config_sha256": _config_hash(config), "weights_sha256": _hash(params)}
        theirs = _their_model(cls.__name__, folder)
        config = config.replace(dtype="float32", param_dtype="float32", residual_dtype="float32")
        ours = module_of(cls, config, {k: jnp.asarray(v, jnp.float32) for k, v in params.items()})
    count = sum(v.size for v in params.values())
    print(f"Parity report: {cls.__name__}, {count:,} parameters, computed in float32.")
    print("Largest error of each output, relative to the largest value of the reference:")
    inputs = dict(_inputs(config))
    our_values = _jit(ours, _our_values)
    errors: dict[str, dict[str, float]] = {}
    for name, (ids, mask) in inputs.items():
        reference = _their_values(theirs, cls, ids, mask)
        values = our_values(ids, mask)
        for row in sorted(values, key=list(reference).index):  # in the order of the model
            errors.setdefault(row, {})[name] = _error(np.asarray(values[row]), reference[row], mask)
    worst, row, name = max((e, row, name) for row, by in errors.items() for name, e in by.items())
    _print_table(errors, list(inputs), config)
    print(f"largest error {worst:.2e} ({row}, {name}), tolerance {tolerance:.0e}")
    return {
        "model": cls.__name__,
        **hashes,
        "inputs": {name: list(ids.shape) for name, (ids, _) in inputs.items()},
        "errors": {
            row: {name: e if np.isfinite(e) else None for name, e in by.items()}
            for row, by in errors.items()
        },
        "worst": worst if np.isfinite(worst) else None,
        "passed": worst <= tolerance,
    }


def _jit(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled function(model, *args) of args; what it sets on the model is dropped."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graph, state), *args))
    return lambda *args: compiled(state, *args)


def _inputs(config: ModernBertConfig) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Yields name, (ids_BL, mask_BL)."""
    rng = np.random.default_rng(SEED)

    def make(*spans: tuple[int, int], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, config.vocab_size, (len(spans), length))
        mask = np.stack([(np.arange(length) >= a) & (np.arange(length) < b) for a, b in spans])
        return np.where(mask, ids, config.pad_token_id or 0), mask.astype(np.int64)

    yield "plain", make((0, 16), (0, 16), length=16)
    yield "padded right", make((0, 40), (0, 23), length=40)
    yield "padded left", make((0, 40), (17, 40), length=40)
    length = 2 * config.window + 37  # some keys are outside the window on both sides
    yield "long", make((0, length), length=length)


def _our_values(model: Any, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    encoder = getattr(model, "model", model)
    norm, last = encoder.final_norm, []
    # hidden_states end after the final norm, as in transformers; we also want its input.
    encoder.final_norm = lambda x_BLD: last.append(x_BLD) or norm(x_BLD)
    out = encoder(ids, mask, output_hidden_states=True)
    encoder.final_norm = norm
    embeddings, *layers, hidden = out.hidden_states
    values = {"embeddings": embeddings}
    values |= {f"layer {i}": x for i, x in enumerate([*layers, *last])}
    values["final_norm"] = hidden
    if isinstance(model, heads.ModernBertForMultipleChoice):
        values["logits"] = model(ids[None], mask[None]).logits
    elif isinstance(model, heads.ModernBertForSequenceClassification):
        pooled = pool(hidden, mask, 1, model.config.classifier_pooling)[:, 0]
        values |= {"head": model.head(pooled), "logits": model(ids, mask).logits}
    elif isinstance(model, heads.ModernBertForQuestionAnswering):
        spans = model(ids, mask)
        logits = jnp.stack([spans.start_logits, spans.end_logits], axis=-1)
        values |= {"head": model.head(hidden), "logits": logits}
    elif encoder is not model:
        values |= {"head": model.head(hidden), "logits": model(ids, mask).logits}
    return values


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
    """Largest error at tokens, relative to the reference's largest value; infinity for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.shape[:2] == mask.shape:
        ours, theirs = ours[mask == 1], theirs[mask == 1]
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny)
    return float(error) if np.isfinite(error) else float("inf")


def _print_table(
    errors: Mapping[str, Mapping[str, float]], inputs: list[str], config: ModernBertConfig
) -> None:
    print(f"{'output':12} {'attention':>18} " + " ".join(f"{name:>12}" for name in inputs))
    for row, by in errors.items():
        kind = config.layer_types[int(row.split()[1])] if row.startswith("layer ") else ""
        print(f"{row:12} {kind:>18} " + " ".join(f"{by[name]:12.2e}" for name in inputs))


def _golden(folder: Path) -> dict[str, Any]:
    """Compares the published values of GOLDEN_ID with this library; needs no torch."""
    from tokenizers import Tokenizer

    check_files(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(GOLDEN_TEXT).ids
    model = ModernBertForMaskedLM.from_pretrained(folder, dtype="float32")

    def outputs(model: Any, ids_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model(ids_BL).logits, model.model(ids_BL).last_hidden_state

    logits, hidden = _jit(model, outputs)(np.asarray([ids]))
    found = {"logits": (logits, GOLDEN_LOGITS), "hidden": (hidden, GOLDEN_HIDDEN)}
    result: dict[str, Any] = {"text": GOLDEN_TEXT, "tolerance": GOLDEN_TOLERANCE, "passed": True}
    for name, (values, golden) in found.items():
        values, golden = np.asarray(values)[0, :3, :3], np.asarray(golden)
        # Absolute and relative, as in the tests that the values come from.
        close = np.allclose(values, golden, atol=GOLDEN_TOLERANCE, rtol=GOLDEN_TOLERANCE)
        error = float(np.abs(values - golden).max()) if values.shape == golden.shape else None
        result[name] = error
        result["passed"] = bool(result["passed"] and close)
        print(f"golden {name}: largest error {error}, {'passed' if close else 'FAILED'}")
    return result


def _config_hash(config: ModernBertConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _hash(params: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of key, dtype, shape and bytes of the Hugging Face tensors, sorted by key.

    It is the same for every form of a checkpoint.
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
