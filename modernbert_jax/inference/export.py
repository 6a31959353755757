"""Compile once: functions exported beside a model, a cache of compiled programs, cold starts timed.

    python -m modernbert_jax export MODEL OUT --tokens 64 512
    python -m modernbert_jax benchmark OUT --compile-cache CACHE

OUT is a checkpoint as any other with a folder functions/, one jax.export file a shape: StableHLO
without weights. Where a file fits what is called (model, dtype, shape, platform) neither tracing
nor lowering is left to do, only the compiler, and that too comes from the cache the second time.
Such a file is a program of array operations that jax compiles and runs: serve your own exports.
For a platform that is not at hand attention is exported as XLA has it, without a kernel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from modernbert_jax.checkpoint.files import CONFIG_FILE, write_bytes
from modernbert_jax.checkpoint.hub import resolve
from modernbert_jax.config import ModernBertConfig
from modernbert_jax.packing import row_size
from modernbert_jax.tokenizer import AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FUNCTIONS = "functions"


def use_compile_cache(folder: str | os.PathLike[str]) -> None:
    """Keeps every compiled program in `folder` and finds it there in later processes.

    Sets jax's own options, for the whole process.
    """
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", os.fspath(pathlib.Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a process that has compiled already would not look again


def platform() -> str:
    """The platform at hand as jax.export names it: "cpu", "tpu", "cuda" ..."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def batch_tokens_here() -> int:
    """Tokens of a packed row that suit the platform at hand: a CPU's caches hold little."""
    return 512 if platform() == "cpu" else 16_384


class Function:
    """f(params, *arrays and ints): jitted, or as exported where `folder` has the shapes that come.

    Ints are static.
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
        self._folder = None if folder is None else pathlib.Path(folder) / FUNCTIONS
        # What changes the program and is no shape goes into the name: the configuration as it
        # comes back from a file, and what no file holds.
        saved = dataclasses.asdict(ModernBertConfig.from_dict(config.to_dict()))
        dtypes = {k: getattr(config, k) for k in ("dtype", "param_dtype", "residual_dtype")}
        what = json.dumps(saved | dtypes | {"hf_extra": None}, sort_keys=True)
        self._name = f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        self._ready: dict[str, Callable[..., Any]] = {}

    def __call__(self, params: Any, *args: Any) -> Any:
        if self._folder is None:
            return self._jitted(params, *args)
        name = self._file(args)
        if name not in self._ready:
            self._ready[name] = self._load(self._folder / name)
        return self._ready[name](params, *args)

    def _file(self, args: Sequence[Any]) -> str:
        sizes = [str(a) if isinstance(a, int) else "x".join(map(str, a.shape)) for a in args]
        return "-".join([self._name, *sizes]) + ".jax_export"

    def _load(self, path: pathlib.Path) -> Callable[..., Any]:
        if not path.is_file():
            return self._jitted
        try:
            exported = jax.export.deserialize(bytearray(path.read_bytes()))
        except Exception as error:  # another version's, or cut short
            reason = f"{type(error).__name__} when it was read"
        else:
            if platform() in exported.platforms:
                run = jax.jit(exported.call)
                return lambda params, *args: run(
                    params, *(a for a in args if not isinstance(a, int))
                )
            reason = f"made for {', '.join(exported.platforms)}"
        warnings.warn(
            f"{path}: not used ({reason}), so this shape is traced anew; export again for "
            f"{platform()} and jax {jax.__version__}",
            stacklevel=4,
        )
        return self._jitted

    def export(
        self,
        folder: str | os.PathLike[str],
        params: Any,
        tokens: Sequence[int],
        more: Callable[[int], tuple[Any, ...]],
        platforms: Sequence[str] | None,
    ) -> list[int]:
        """Writes this function for one text in rows that hold so many tokens; the rows' sizes.

        more: what follows ids and segments in a call, for a size of row.
        """
        sizes = sorted({row_size(size) for size in tokens})
        for size in sizes:
            row = np.zeros((1, size), np.int32)
            args = (row, row, *more(size))
            exported = jax.export.export(self._jitted, platforms=platforms)(params, *args)
            path = pathlib.Path(folder) / FUNCTIONS / self._file(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, bytes(exported.serialize()))
        return sizes


def save(folder: str | os.PathLike[str], model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """The checkpoint that exported functions stand beside.

    Raises FileExistsError where `folder` holds a model of another class: it would lose its head.
    """
    path, name = pathlib.Path(folder) / CONFIG_FILE, type(model).__name__
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8")).get("architectures")
        if found != [name]:
            raise FileExistsError(f"{folder}: expected a new folder or a {name}, found {found}")
    model.save_pretrained(folder, tokenizer=tokenizer)


def load(
    cls: type, model: Any, tokenizer: Any, options: dict[str, Any], compile_cache: Any = None
) -> tuple[Any, PreTrainedTokenizerFast, pathlib.Path | None]:
    """(model, tokenizer, folder or None) of a folder, a hub id, or a model of `cls`.

    options: those of from_pretrained. Raises TypeError for anything else, ValueError where the
    tokenizer has more tokens than the model.
    """
    if compile_cache is not None:
        use_compile_cache(compile_cache)
    folder = None
    if isinstance(model, str | os.PathLike):
        folder = resolve(model, options.get("revision"))
        tokenizer = folder if tokenizer is None else tokenizer
        model = cls.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    elif given := [name for name, value in options.items() if value is not None]:
        raise TypeError(f"{', '.join(given)}: expected none beside a model that is loaded already")
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
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size:,} tokens, got "
            f"{len(tokenizer):,}; they do not belong together"
        )
    return model, tokenizer, folder
