"""The checkpoints of a run: WORKDIR/checkpoints/00001200, in the library's Orbax layout.

Orbax writes the arrays in the background. `data/state.json` holds where the run stands, the size of
every file and a fingerprint of every array, so that a checkpoint that was cut short or changed on
disk is noticed when it is read, and the one before it is used. config.json is written last and
commits a checkpoint.

Orbax's `training.Checkpointer` (v1, 0.12) would also remove old checkpoints, but it puts everything
into subfolders of its own: config.json, tokenizer.json and data/state.json would lie outside its
commit, so that a crash could leave a committed checkpoint that `from_pretrained` and `convert`
cannot read.
"""

import hashlib
import json
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
from ..common.workdir import committed
from .step import Trainer, TrainState

_ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "layer_types", "tie_word_embeddings",
)  # fmt: skip


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
        self._saving: Future[None] | None = None

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Copies the state off the devices and writes it in the background.

        Waits for the previous save. Once a checkpoint is committed, all but the newest `keep` are
        removed. Raises OSError, here or at the next call, if it cannot be written.
        """
        self.wait()
        step = int(state.optimizer.step)
        if step == self._last:
            return
        self._last = step
        folder = self.workdir / "checkpoints" / f"{step:08d}"
        marks = {k: int(v) for k, v in fingerprints(state).items()}
        if jax.default_backend() == "cpu":
            # There "off the device" is the same memory, which the next step overwrites.
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
            self._fail(error)

        def commit() -> None:
            finish()
            if is_first():
                for old in committed(self.workdir)[: -self.keep]:
                    (old / CONFIG_FILE).unlink()  # no longer committed
                    remove_tree(old)

        self._saving = self._thread.submit(commit)

    def wait(self) -> None:
        """Returns once nothing is being written. Raises OSError if the last save failed."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        good = committed(self.workdir)
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(
            f"checkpoint of step {self._last}: could not be written ({reason}); free disk space, "
            f"then the same command resumes from {good[-1] if good else 'the start'}"
        ) from error

    def close(self) -> None:
        """Lets a save in progress end, whether it succeeds or not."""
        self._thread.shutdown()

    def restore(self) -> tuple[TrainState, dict[str, Any], Any] | None:
        """Returns (state, position, folder) of the newest intact checkpoint; None without one.

        A damaged one is renamed to NAME.damaged and logged. Raises ValueError if the newest has
        another architecture.
        """
        if is_first():
            for path in self.workdir.glob("checkpoints/*"):
                if path.name.isdigit() and not (path / CONFIG_FILE).exists():
                    remove_tree(path)  # a crash interrupted this save
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
                _check_sizes(folder)
            except Damaged as error:
                self._set_aside(folder, error)
                continue
            return int(folder.name)
        return -1

    def _set_aside(self, folder: Any, error: Damaged) -> None:
        self.log(f"{folder}: damaged ({error}); using the checkpoint before it")
        if is_first():
            folder.rename(folder.with_name(folder.name + ".damaged"))

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
