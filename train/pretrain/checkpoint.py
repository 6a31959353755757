"""The checkpoints of a run: WORKDIR/checkpoints/00001200, in the library's Orbax layout.

Orbax writes the arrays in the background. `data/state.json` holds where the run stands, the size of
every file, a fingerprint of every array and the digest of config.json, so that a checkpoint that
was cut short or changed on disk is noticed when it is read, and the one before it is used.
config.json is written last and commits a checkpoint. A state that has exploded is never saved.

Orbax's `training.Checkpointer` (v1, 0.12) would also remove old checkpoints, but it puts everything
into subfolders of its own: config.json, tokenizer.json and data/state.json would lie outside its
commit, so that a crash could leave a committed checkpoint that `from_pretrained` and `convert`
cannot read.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import CONFIG_FILE, remove_tree
from modernbert_jax.checkpoint.orbax import load_orbax, start_save_orbax

from ..common.hosts import from_first, is_first
from ..common.optimizer import StableAdamWState
from ..common.workdir import committed, is_checkpoint_name
from .data import Position
from .extend import Past, kept
from .step import Trainer, TrainState

# No ModernBERT comes near these root mean squares of one array; a run that has exploded passes
# them long before float32 overflows. Moments are on the scale of gradients.
_LARGEST = {"params": 100.0, "mu": 1e6, "nu": 1e12}
_ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "layer_types", "tie_word_embeddings",
)  # fmt: skip


class Diverged(RuntimeError):
    """The loss, the gradient, a weight or a moment is not finite, or far too large."""


class Damaged(Exception):
    """The files of a checkpoint are not what was written."""


class Checkpoints:
    """Saves and restores the state of one run. workdir: a path of pathlib or epath.

    Every process of the job makes the same calls.
    """

    def __init__(self, workdir: Any, trainer: Trainer, keep: int, log: Callable[[str], None]):
        self.workdir, self.trainer, self.keep, self.log = workdir, trainer, keep, log
        self._last = -1  # the newest step that is saved or being saved
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        logging.getLogger("absl").addFilter(_is_news)
        self._saving: Future[None] | None = None

    def save(self, state: TrainState, position: dict[str, Any], past: Past | None = None) -> None:
        """Copies the state off the devices and writes it in the background.

        past: what its last step was. Waits for the previous save. Once a checkpoint is committed,
        all but the newest `keep` and those for larger budgets are removed. Raises Diverged, and
        writes and removes nothing, if a weight or a moment is not finite or far too large; OSError,
        here or at the next call, if it cannot be written.
        """
        self.wait()
        step = int(state.optimizer.step)
        if step == self._last:
            return
        _check_finite(state, step)
        self._last = step
        folder = self.workdir / "checkpoints" / f"{step:08d}"
        marks = {k: int(v) for k, v in fingerprints(state).items()}
        if jax.default_backend() == "cpu":
            # There "off the device" is the same memory, which the next step overwrites.
            state = jax.tree.map(jnp.copy, state)

        def data() -> dict[str, Any]:
            return _sealed(
                {
                    "position": position,
                    **({"past": dataclasses.asdict(past)} if past else {}),
                    "fingerprints": marks,
                    "files": _sizes(folder),
                    "config_sha256": _digest(_config_values(self.trainer.model_config)),
                }
            )

        try:
            finish = start_save_orbax(
                folder,
                architecture=ModernBertForMaskedLM.__name__,
                config=self.trainer.model_config,
                params=state.params,
                optimizer={"step": step, "mu": state.optimizer.mu, "nu": state.optimizer.nu},
                tokenizer_dir=self.workdir / "tokenizer",
                data=data,
            )
        except Exception as error:
            self._fail(error)

        def commit() -> None:
            finish()
            if is_first():
                _check_files(folder)  # before an older one is removed
                for old in self._outdated():
                    _remove(old)

        self._saving = self._thread.submit(commit)

    def _outdated(self) -> list[Any]:
        every = committed(self.workdir)
        older = every[: -self.keep]
        if not older:
            return []
        pasts = {folder.name: past for folder in every if (past := past_of(folder))}
        wanted = kept(pasts, self.trainer.config.phases)
        return [folder for folder in older if folder.name not in wanted]

    def wait(self) -> None:
        """Returns once nothing is being written. Raises OSError if the last save failed."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT))
        raise OSError(
            f"checkpoint of step {self._last}: could not be written ({reason}); "
            f"{'free disk space, then ' if full else ''}the same command resumes from "
            f"{self.last_good()}"
        ) from error

    def last_good(self) -> str:
        """Returns the newest committed checkpoint, for a message."""
        good = committed(self.workdir)
        return str(good[-1]) if good else "the start"

    def close(self) -> None:
        """Lets a save in progress end, whether it succeeds or not."""
        self._thread.shutdown()

    def newest(self, suits: Callable[[Past], bool]) -> tuple[Any, Past] | None:
        """Returns the newest checkpoint whose past suits, with it; None without one."""
        for folder in reversed(committed(self.workdir)):
            if (past := past_of(folder)) and suits(past):
                with contextlib.suppress(Damaged):
                    _check_files(folder)
                    return folder, past
        return None

    def discard_after(self, folder: Any) -> int:
        """Removes all checkpoints that are newer than one, and returns the newest one's step."""
        newer = [path for path in committed(self.workdir) if int(path.name) > int(folder.name)]
        for path in reversed(newer):
            _remove(path)
        return int((newer or [folder])[-1].name)

    def restore(self) -> tuple[TrainState, dict[str, Any], Any] | None:
        """Returns (state, position, folder) of the newest intact checkpoint; None without one.

        A damaged one is renamed to NAME.damaged and logged. Raises ValueError if the newest has
        another architecture.
        """
        if is_first():
            for path in self.workdir.glob("checkpoints/*"):
                if is_checkpoint_name(path.name) and not (path / CONFIG_FILE).exists():
                    # A crash interrupted this save.
                    remove_tree(path) if path.is_dir() else path.unlink()
        while True:
            step = from_first(self._newest() if is_first() else 0)
            if step < 0:
                return None
            folder = self.workdir / "checkpoints" / f"{step:08d}"
            try:
                state, position = self._load(folder)
            except Damaged as error:
                self._set_aside(folder, error)
                continue
            self._last = step
            return state, position, folder

    def _newest(self) -> int:
        """Returns the newest step whose files have their original sizes; -1 without one."""
        for folder in reversed(committed(self.workdir)):
            try:
                _check_files(folder)
            except Damaged as error:
                self._set_aside(folder, error)
                continue
            return int(folder.name)
        return -1

    def _set_aside(self, folder: Any, error: Damaged) -> None:
        self.log(f"{folder}: damaged ({error}); using the checkpoint before it")
        if is_first():
            names = (f"{folder.name}.damaged{n}" for n in ("", *(f"-{i}" for i in range(2, 99))))
            free = next(n for n in names if not folder.with_name(n).exists())
            folder.rename(folder.with_name(free))

    def _load(self, folder: Any) -> tuple[TrainState, dict[str, Any]]:
        _check_architecture(folder, self.trainer.model_config)
        data = _read_state(folder)
        try:
            loaded = load_orbax(folder, optimizer=True, shardings=self.trainer.shardings.params)
        except Exception as error:  # a reader of damaged bytes may raise anything
            raise Damaged(str(error).strip().split("\n")[0]) from None
        optimizer = loaded["optimizer"]
        step = jax.device_put(np.int32(optimizer["step"]), self.trainer.replicated)
        state = TrainState(
            loaded["params"], StableAdamWState(step, optimizer["mu"], optimizer["nu"])
        )
        found = {k: int(v) for k, v in fingerprints(state).items()}
        for name, mark in data["fingerprints"].items():
            if found.get(name) != mark:
                raise Damaged(f"{name} is not what was written")
        return state, data["position"]


def _is_news(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax logs of errors which it raises as well, once per thread."""
    return not (record.exc_info and "orbax" in record.pathname)


@jax.jit
def fingerprints(state: TrainState) -> dict[str, jax.Array]:
    """Returns {name: uint32}: the sum of an array's words, each times an odd number of its own.

    Integers add up to the same on any mesh, and a change to any single word changes the sum.
    """

    def mark(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        factor = jnp.ones(x.shape, jnp.uint32)
        stride = 2
        for axis in reversed(range(x.ndim)):
            factor += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
            stride *= x.shape[axis]
        return jnp.sum(words.astype(jnp.uint32) * factor, dtype=jnp.uint32)

    trees = {"params": state.params, "mu": state.optimizer.mu, "nu": state.optimizer.nu}
    return {
        f"{name} {path}": mark(x) for name, tree in trees.items() for path, x in tree.items()
    } | {"step": mark(state.optimizer.step)}


def _sizes(folder: Any) -> dict[str, int]:
    """Returns {path: bytes} of every file of the arrays."""
    return {
        f"{name}/{path}": size
        for name in ("params", "optimizer")
        for path, size in _walk(folder / name)
    }


def _walk(folder: Any) -> Iterator[tuple[str, int]]:
    """Yields (path, bytes) of the files below; a bucket lists one level at a time."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            yield from ((f"{path.name}/{name}", size) for name, size in _walk(path))
        else:
            stat = path.stat()  # epath's has a length instead
            yield path.name, stat.length if hasattr(stat, "length") else stat.st_size


def _sealed(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"sha256": _digest(data)}


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def past_of(folder: Any) -> Past | None:
    """Returns what the last step of a checkpoint was; None if that is unknown."""
    try:
        return Past.from_json(_read_state(folder)["past"])
    except (Damaged, KeyError, TypeError):
        return None


def _remove(folder: Any) -> None:
    (folder / CONFIG_FILE).unlink()  # no longer committed
    remove_tree(folder)


def _read_state(folder: Any) -> dict[str, Any]:
    try:
        data = json.loads((folder / "data" / "state.json").read_text())
        seal = data.pop("sha256")
        position = set(data["position"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Damaged("data/state.json cannot be read") from None
    if seal != _digest(data):
        raise Damaged("data/state.json is not what was written")
    if position != {field.name for field in dataclasses.fields(Position)}:
        raise Damaged("data/state.json is of another version: its position has other entries")
    return data


def _config_values(config: ModernBertConfig) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {"architectures": [ModernBertForMaskedLM.__name__]} | config.to_dict()


def _check_files(folder: Any) -> None:
    """Raises Damaged unless every file but config.json's has its size, and that its content."""
    data = _read_state(folder)
    found = _sizes(folder)
    for name, size in data["files"].items():
        if found.get(name) != size:
            raise Damaged(f"{name}: expected {size:,} bytes, found {found.get(name, 0):,}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        raise Damaged(f"{CONFIG_FILE} cannot be read") from None
    if "config_sha256" in data and _digest(config) != data["config_sha256"]:
        raise Damaged(f"{CONFIG_FILE} is not what was written")


@jax.jit
def _root_mean_squares(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Returns {tree: {path: float32}}; not finite if a value is not, or if a square overflows."""

    def of(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    optimizer = state.optimizer
    trees = {"params": state.params, "mu": optimizer.mu, "nu": optimizer.nu}
    return {name: {path: of(x) for path, x in tree.items()} for name, tree in trees.items()}


def _check_finite(state: TrainState, step: int) -> None:
    for tree, values in jax.device_get(_root_mean_squares(state)).items():
        for path, value in values.items():
            if not value <= _LARGEST[tree]:
                raise Diverged(
                    f"step {step}: the root mean square of {tree} {path} is {value:.3g}, expected "
                    f"at most {_LARGEST[tree]:g}, so this step was not saved"
                )


def check_evaluation(loss: float, step: int, vocab_size: int) -> None:
    """Raises Diverged if the loss is not finite, or half above that of guessing every token."""
    limit = 1.5 * math.log(vocab_size)
    if not loss <= limit:
        raise Diverged(
            f"step {step}: the evaluation loss is {loss:.3f}, expected at most {limit:.3f} (1.5 "
            "times that of guessing)"
        )


def _check_architecture(folder: Any, config: ModernBertConfig) -> None:
    try:
        found = ModernBertConfig.from_json(folder / CONFIG_FILE).to_dict()
    except ValueError as error:
        raise Damaged(str(error)) from None
    expected = config.to_dict()
    for name in _ARCHITECTURE:
        if found[name] != expected[name]:
            raise ValueError(
                f"{folder}: a checkpoint of another model: {name} expected {expected[name]}, got "
                f"{found[name]}; use another --workdir"
            )
