"""Orbax directories, the layout of training:

    DIR/params/  DIR/optimizer/{step,mu,nu}  DIR/data/  DIR/config.json  DIR/tokenizer.json ...

`config.json` is written last: a directory without it is an incomplete checkpoint.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from modernbert_jax.checkpoint.files import (
    CONFIG_FILE,
    absolute_path,
    copy_tokenizer,
    read_config,
    remove_tree,
    write_text,
)
from modernbert_jax.checkpoint.params import check_dtypes
from modernbert_jax.config import ModernBertConfig


def is_orbax(folder: str | os.PathLike[str]) -> bool:
    """Whether a directory has the layout that `save_orbax` writes."""
    return (absolute_path(folder) / "params").is_dir()


def save_orbax(folder: str | os.PathLike[str], **content: Any) -> None:
    """Writes a checkpoint into a new directory and returns when it is complete.

    Takes the arguments of `start_save_orbax` and raises the same errors.
    """
    start_save_orbax(folder, in_turn=True, **content)()


def start_save_orbax(
    folder: str | os.PathLike[str],
    *,
    architecture: str,
    config: ModernBertConfig,
    params: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    data: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    in_turn: bool = False,
) -> Callable[[], None]:
    """Copies the arrays from the devices and writes them in the background.

    Returns a function that waits for the writes and commits the checkpoint. Every process of a job
    must call both; the first process writes everything that is not an array.

    architecture: the model's class, such as "ModernBertForMaskedLM". params: {path: array}.
    optimizer: {"step": int, "mu": {path: array}, "nu": {path: array}}. data: the position of a
    training run as plain JSON, or a function that returns it once the arrays are written. in_turn:
    write one tree after the other, which needs less memory and leaves no work to the background.
    Raises FileExistsError if `folder` is a complete checkpoint, ValueError for params of dtypes
    that are not read again, OSError (also from the returned function) if it cannot be written.
    """
    root = absolute_path(folder)
    check_dtypes(params)
    first = jax.process_index() == 0
    if (root / CONFIG_FILE).exists():
        raise FileExistsError(f"{root}: expected a new directory, found a checkpoint")
    if first:
        if root.exists():
            remove_tree(root)  # an unfinished save of the same step
        root.mkdir(parents=True)
    trees: dict[str, Any] = {"params": _nest(params)}
    if optimizer is not None:
        trees["optimizer"] = {
            "step": np.asarray(optimizer["step"], np.int32),
            "mu": _nest(optimizer["mu"]),
            "nu": _nest(optimizer["nu"]),
        }
    waiting = []
    for name, tree in trees.items():
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree))
        with _orbax_context(largest, copy=not in_turn):
            waiting.append(ocp.save_async(str(root / name), tree))
        if in_turn:
            waiting.pop().result()

    def finish() -> None:
        for response in waiting:
            response.result()
        if not first:
            return
        if data is not None:
            values = data() if callable(data) else data
            (root / "data").mkdir()
            write_text(root / "data" / "state.json", json.dumps(values, indent=2) + "\n")
        copy_tokenizer(tokenizer_dir, root)
        values = {"architectures": [architecture]} | config.to_dict()
        write_text(root / CONFIG_FILE, json.dumps(values, indent=2) + "\n")

    return finish


def orbax_shapes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns {path: shape and dtype} of a checkpoint's parameters without reading them.

    Raises ValueError with one line if it is damaged.
    """
    return _undamaged(absolute_path(folder) / "params", _leaves)


def load_orbax(
    folder: str | os.PathLike[str],
    optimizer: bool = False,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint: {"config", "architecture", "params", "optimizer", "data"}.

    architecture: the class that config.json names, or None. params: {path: array}. optimizer: None
    unless requested. data: None if there is none. The arrays are NumPy's, or jax's with `shardings`
    {path: sharding}, each read straight to its devices. Raises FileNotFoundError if the checkpoint
    is incomplete or lacks the requested optimizer, ValueError with one line if it is damaged.
    """
    root = absolute_path(folder)
    if not (root / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{root}: expected a complete checkpoint (params/ and {CONFIG_FILE}), found no "
            f"{CONFIG_FILE}"
        )
    config, architecture = read_config(root)
    out: dict[str, Any] = {"config": config, "architecture": architecture}
    out["params"] = _undamaged(root / "params", _read, shardings)
    out["optimizer"] = out["data"] = None
    if optimizer:
        if not (root / "optimizer").exists():
            raise FileNotFoundError(f"{root}: no optimizer/ in this checkpoint")
        by_moment = {f"{m}.{k}": s for m in ("mu", "nu") for k, s in (shardings or {}).items()}
        state = _undamaged(root / "optimizer", _read, by_moment)
        out["optimizer"] = {"step": int(state["step"])} | {
            moment: {k[3:]: v for k, v in state.items() if k.startswith(moment + ".")}
            for moment in ("mu", "nu")
        }
    state_file = root / "data" / "state.json"
    if state_file.exists():
        out["data"] = json.loads(state_file.read_text(encoding="utf-8"))
    return out


def _undamaged(folder: Any, read: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Returns read(folder, *args). Raises ValueError if the tree in the folder is damaged."""
    try:
        return read(folder, *args)
    except MemoryError:
        raise
    except Exception as error:  # a reader of damaged bytes may raise anything
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{folder}: not a complete Orbax checkpoint ({type(error).__name__}: {reason})"
        ) from error


def _leaves(folder: Any) -> dict[str, Any]:
    """Returns {path: shape and dtype} of one tree."""
    metadata = ocp.metadata(str(folder)).metadata
    if metadata is None:
        raise ValueError("expected arrays, found none")
    return _unnest(metadata)


def _read(folder: Any, shardings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads one tree as {path: array}."""
    parts: list[dict[str, Any]] = [{}]  # read in turn: all at once needs twice the memory
    size = largest = 0
    for path, leaf in _leaves(folder).items():
        nbytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        largest = max(largest, nbytes)
        if parts[-1] and size + nbytes > 128 * 1024**2:
            parts.append({})
            size = 0
        parts[-1][path] = (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
            if shardings and path in shardings
            else np.empty((0,), leaf.dtype)
        )
        size += nbytes
    flat: dict[str, Any] = {}
    context = _orbax_context(largest)
    context.pytree.loading.partial_load = True
    with context:
        for part in parts:
            flat |= _unnest(ocp.load(str(folder), _nest(part)))
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(dict(flat), sep=".")


def _unnest(tree: Any) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="."))


def _orbax_context(largest_bytes: int, copy: bool = False) -> ocp.Context:
    # Orbax's defaults peak at 2.4 to 3.3 times the checkpoint's size in memory. This writes
    # uncompressed, keeps at most the largest leaf in flight, and copies NumPy leaves only if the
    # save continues in the background.
    # Orbax refuses a leaf of exactly the limit.
    limit = max(largest_bytes, 64 * 1024**2) + 1
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = copy
    context.memory.write_concurrent_bytes = limit
    context.memory.read_concurrent_bytes = limit
    return context
