"""The checkpoints of a run: WORKDIR/checkpoints/00001200, in the library's Orbax layout.

They are written in the background. `data/state.json` holds where the run stands, the size of every
file and a fingerprint of every array, so that a checkpoint that was cut short or changed on disk is
noticed when it is read, and the one before it is used.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import CONFIG_FILE, remove_tree
from modernbert_jax.checkpoint.orbax import load_orbax, start_save_orbax

from ..common.hosts import from_first, is_first
from ..common.optimizer import StableAdamWState
from ..common.workdir import committed
from .step import Trainer, TrainState

_ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "layer_types", "tie_word_embeddings",
)  # fmt: skip


class Damaged(Exception):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """Saves and restores the state of one run. workdir: a path of pathlib's or epath's.

    Every process of the job makes the same calls.
    """

    def __init__(self, workdir: Any, trainer: Trainer, keep: int, say: Callable[[str], None]):
        self.workdir, self.trainer, self.keep, self.say = workdir, trainer, keep, say
        self._last = -1  # the newest step that is saved, or being saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Takes the state off the devices and goes on writing in the background.

        Waits for the save before it. When one is whole, all but the newest `keep` are removed.
        Raises OSError, here or at the next call, where a checkpoint could not be written.
        """
        self.wait()
        step = int(state.optimizer.step)
        if step == self._last:
            return
        self._last = step
        folder = self.workdir / "checkpoints" / f"{step:08d}"
        marks = {k: int(v) for k, v in fingerprints(state).items()}
        if jax.default_backend() == "cpu":
            # There "off the device" is the same memory, and the next step writes into it.
            state = jax.tree.map(jnp.copy, state)

        def data() -> dict[str, Any]:
            return _sealed({"position": position, "fingerprints": marks, "files": _sizes(folder)})

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
            self._error = error
            return self.wait()

        def commit() -> None:
            try:
                finish()
                if is_first():
                    for old in committed(self.workdir)[: -self.keep]:
                        (old / CONFIG_FILE).unlink()  # from here on it is not whole
                        remove_tree(old)
            except BaseException as error:  # raised by wait()
                self._error = error

        self._thread = threading.Thread(target=commit, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises OSError where that did not end well."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            good = committed(self.workdir)
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise OSError(
                f"checkpoint of step {self._last}: could not be written ({reason}); make room, "
                f"then the same command goes on from {good[-1] if good else 'the start'}"
            ) from error

    def close(self) -> None:
        """Lets a save that is under way end, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join()

    def restore(self) -> tuple[TrainState, dict[str, Any], Any] | None:
        """(state, position, folder) of the newest checkpoint that is sound; None without one.

        A damaged one is renamed to NAME.damaged, with a line that says so. Raises ValueError where
        the newest is of another architecture.
        """
        if is_first():
            for path in self.workdir.glob(
                "checkpoints/*"
            ):  # left by a crash in the middle of a save
                if path.name.isdigit() and not (path / CONFIG_FILE).exists():
                    remove_tree(path)
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
        """The newest step whose files have the sizes they were written with; -1 without one."""
        for folder in reversed(committed(self.workdir)):
            try:
                _check_sizes(folder)
            except Damaged as error:
                self._set_aside(folder, error)
                continue
            return int(folder.name)
        return -1

    def _set_aside(self, folder: Any, error: Damaged) -> None:
        self.say(f"{folder}: damaged ({error}); going back to the one before it")
        if is_first():
            folder.rename(folder.with_name(folder.name + ".damaged"))

    def _load(self, folder: Any) -> tuple[TrainState, dict[str, Any]]:
        _check_architecture(folder, self.trainer.model_config)
        data = _read_state(folder)
        try:
            loaded = load_orbax(folder, optimizer=True, shardings=self.trainer.shardings.params)
        except (
            Exception
        ) as error:  # what a reader meets in bytes that are not its own is its affair
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


@jax.jit
def fingerprints(state: TrainState) -> dict[str, jax.Array]:
    """Name -> uint32 of an array's bits: the sum of its words, each times an odd number of its own.

    Integers add up to the same on any mesh, and no single word can change without changing it.
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
    """Path -> bytes of every file of the arrays."""
    return {
        f"{name}/{path}": size
        for name in ("params", "optimizer")
        for path, size in _walk(folder / name)
    }


def _walk(folder: Any) -> Iterator[tuple[str, int]]:
    """(path, bytes) of the files below; a bucket lists one level at a time."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            yield from ((f"{path.name}/{name}", size) for name, size in _walk(path))
        else:
            stat = path.stat()  # epath has its own, with a length
            yield path.name, stat.length if hasattr(stat, "length") else stat.st_size


def _sealed(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"sha256": _digest(data)}


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _read_state(folder: Any) -> dict[str, Any]:
    try:
        data = json.loads((folder / "data" / "state.json").read_text())
        seal = data.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        raise Damaged("data/state.json cannot be read") from None
    if seal != _digest(data):
        raise Damaged("data/state.json is not what was written")
    return data


def _check_sizes(folder: Any) -> None:
    expected, found = _read_state(folder)["files"], _sizes(folder)
    for name, size in expected.items():
        if found.get(name) != size:
            raise Damaged(f"{name}: expected {size:,} bytes, found {found.get(name, 0):,}")


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
