"""Exports compiled functions beside a model, and caches compiled programs.

    python -m modernbert_jax export MODEL OUT --tokens 64 512
    python -m modernbert_jax benchmark OUT --exported --compile-cache CACHE

OUT is an ordinary checkpoint with a folder functions/, which holds one jax.export file (StableHLO
without weights) per shape. If a file fits a call (model, dtype, shape, platform), the model is
neither traced nor lowered again, only compiled, and the cache saves that for later processes too.
Such a file is a program, so it runs only when `exported=True` asks for it, from a local folder, and
if this user exported it (see trust.py). For a platform that this machine lacks, attention is
exported without a kernel, in plain XLA.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from modernbert_jax.checkpoint.files import CONFIG_FILE, write_bytes
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.inference.trust import objection, remember, unknown_calls, weights_digest
from modernbert_jax.packing import SLOT_TOKENS, batch_rows, fill_rows, row_size
from modernbert_jax.tokenizer import AutoTokenizer
from modernbert_jax.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FUNCTIONS = "functions"


def use_compile_cache(folder: str | os.PathLike[str]) -> None:
    """Stores every compiled program in `folder`, where later processes find it.

    Sets jax's own options, for the whole process.
    """
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(pathlib.Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # otherwise a process that has compiled before ignores it


def platform() -> str:
    """Returns the platform of this process as jax.export names it: "cpu", "tpu", "cuda" ..."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns `value` as an int. Raises ValueError if it is none, or not from `least` to `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {value!r}")
    return int(value)


def tokens_per_sequence(batch_tokens: int | None) -> int:
    """Returns batch_tokens, or what suits the platform if it is None; a CPU's caches are small.

    Raises ValueError for a number below 1.
    """
    if batch_tokens is not None:
        return whole_number("batch_tokens", batch_tokens, 1)
    return 512 if platform() == "cpu" else 16_384


def packed_batches(
    ids: Sequence[Sequence[int]],
    sequences: int,
    batch_tokens: int,
    description: str,
    show_progress_bar: bool | None,
    batch_size: int | None = None,
) -> Iterator[tuple[list[list[int]], np.ndarray, np.ndarray]]:
    """Yields (text indices per sequence, input_ids_BL, segment_ids_BL), B = `sequences`.

    batch_tokens, batch_size: the most tokens and texts in a packed sequence.
    A row that is not full is padded to SLOT_TOKENS per text, so that short texts need no further
    programs (see segment_slots). A progress bar counts texts on stderr; None shows it in a terminal
    only.
    """
    hide = None if show_progress_bar is None else not show_progress_bar
    with tqdm(total=len(ids), desc=description, unit=" texts", disable=hide) as bar:
        for batch in batch_rows([len(i) for i in ids], sequences, batch_tokens, batch_size):
            tokens = max(sum(len(ids[i]) for i in row) for row in batch)
            room = min(SLOT_TOKENS * max(map(len, batch)), batch_tokens)
            yield batch, *fill_rows(ids, batch, row_size(max(tokens, room)))
            bar.update(sum(map(len, batch)))


class Function:
    """f(params, *arrays and ints): jitted, or the exported program if `folder` has that shape.

    Ints are static. folder: of a checkpoint whose functions this user exported, or None.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        config: ModernBertConfig,
        folder: str | os.PathLike[str] | None = None,
        static_argnums: tuple[int, ...] = (),
    ):
        self._jitted = jax.jit(function, static_argnums=static_argnums)
        self._folder = None if folder is None else pathlib.Path(folder)
        self._weights = ""  # the digest, computed once a program is found
        # A file's name identifies the program: it has the shapes and a hash of the configuration as
        # it is read back from a file, plus the fields that no file stores.
        saved = dataclasses.asdict(ModernBertConfig.from_dict(config.to_dict()))
        dtypes = {k: getattr(config, k) for k in ("dtype", "param_dtype", "residual_dtype")}
        text = json.dumps(saved | dtypes | {"hf_extra": None}, sort_keys=True)
        self._name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self._ready: dict[str, Callable[..., Any]] = {}

    def __call__(self, params: Any, *args: Any) -> Any:
        if self._folder is None:
            return self._jitted(params, *args)
        name = self._file(args)
        if name not in self._ready:
            self._ready[name] = self._load(self._folder, name)
        return self._ready[name](params, *args)

    def _file(self, args: Sequence[Any]) -> str:
        sizes = [str(a) if isinstance(a, int) else "x".join(map(str, a.shape)) for a in args]
        return "-".join([self._name, *sizes]) + ".jax_export"

    def _load(self, folder: pathlib.Path, name: str) -> Callable[..., Any]:
        path = folder / FUNCTIONS / name
        if not path.is_file():
            return self._jitted
        program = path.read_bytes()
        self._weights = self._weights or weights_digest(folder)
        reason = objection(program, self._weights)
        if reason is None:
            exported = jax.export.deserialize(bytearray(program))
            if exported.disabled_safety_checks:
                reason = "it was exported with safety checks disabled"
            elif calls := unknown_calls(exported.mlir_module()):
                reason = f"it calls {', '.join(calls)}"
            elif platform() in exported.platforms:
                run = jax.jit(exported.call)
                return lambda params, *args: run(
                    params, *(a for a in args if not isinstance(a, int))
                )
            else:
                reason = f"made for {', '.join(exported.platforms)}"
        warnings.warn(
            f"{path}: not used ({reason}), so this shape is traced; export again for "
            f"{platform()} and jax {jax.__version__}",
            stacklevel=4,
        )
        return self._jitted

    def warm_up(
        self, params: Any, tokens: Sequence[int], further_args: Callable[[int], tuple[Any, ...]]
    ) -> None:
        """Runs this function once per sequence length, so that later calls compile nothing.

        tokens, further_args: as for `export`.
        """
        for size in sorted({row_size(size) for size in tokens}):
            ids = np.ones((1, size), np.int32)
            jax.block_until_ready(self(params, ids, ids, *further_args(size)))

    def export(
        self,
        folder: str | os.PathLike[str],
        params: Any,
        tokens: Sequence[int],
        further_args: Callable[[int], tuple[Any, ...]],
        platforms: Sequence[str] | None,
    ) -> list[int]:
        """Writes this function for one text of up to each number of tokens; returns the lengths.

        Lengths are rounded up to those of packed sequences. further_args: the arguments that follow
        input and segment ids in a call, for a sequence length.
        """
        sizes = sorted({row_size(size) for size in tokens})
        weights = weights_digest(folder)
        for size in sizes:
            ids = np.zeros((1, size), np.int32)
            args = (ids, ids, *further_args(size))
            exported = jax.export.export(self._jitted, platforms=platforms)(params, *args)
            path = pathlib.Path(folder) / FUNCTIONS / self._file(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            program = bytes(exported.serialize())
            write_bytes(path, program)
            remember(program, weights)
        return sizes


def save(folder: str | os.PathLike[str], model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the checkpoint that exported functions belong to.

    Raises FileExistsError if `folder` holds a model of another class, which would lose its head.
    """
    path, name = pathlib.Path(folder) / CONFIG_FILE, type(model).__name__
    if path.exists():
        found = read_json(path).get("architectures")
        if found != [name]:
            raise FileExistsError(f"{folder}: expected a new folder or a {name}, found {found}")
    model.save_pretrained(folder, tokenizer=tokenizer)


def check_exported(model: Any) -> None:
    """Raises ValueError unless `model` is a local folder with exported functions."""
    local = pathlib.Path(model).expanduser() if isinstance(model, str | os.PathLike) else None
    if local is None or not (local / FUNCTIONS).is_dir():
        raise ValueError(
            "exported: expected a local folder with functions that you exported, got "
            f"{type(model).__name__ if local is None else model}; write one with "
            "`modernbert-jax export`"
        )


def load(
    cls: type,
    model: Any,
    tokenizer: Any,
    options: dict[str, Any],
    compile_cache: Any = None,
    exported: bool = False,
) -> tuple[Any, PreTrainedTokenizerFast, pathlib.Path | None]:
    """Returns (model, tokenizer, folder or None) for a folder, a hub id, or a model of `cls`.

    The folder is that of exported functions, and None unless `exported` asks for them. options:
    arguments of from_pretrained; None stands for its default. Raises TypeError for anything else,
    ValueError if `exported` is asked for without a local folder that has functions.
    """
    if compile_cache is not None:
        use_compile_cache(compile_cache)
    if exported:
        check_exported(model)
    folder = None
    if isinstance(model, str | os.PathLike):
        folder = resolve(model, options.get("revision"))
        tokenizer = folder if tokenizer is None else tokenizer
        model = cls.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    elif given := [name for name, value in options.items() if value is not None]:
        raise TypeError(f"{', '.join(given)}: expected none with a model that is already loaded")
    if not isinstance(model, cls):
        raise TypeError(
            f"model: expected a folder, a hub id or a {cls.__name__}, got {type(model).__name__}"
        )
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            "tokenizer: expected a folder, a hub id or a fast tokenizer of transformers, got "
            f"{type(tokenizer).__name__}"
        )
    return model, tokenizer, folder if exported else None
