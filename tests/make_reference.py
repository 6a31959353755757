"""Writes notebooks/guides/reference.md from docstrings and command lines: `make reference`."""

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import convert.cli
import modernbert_jax
import modernbert_jax.attention.__main__
import modernbert_jax.inference.cli
import train.cli
from modernbert_jax import attention, card, lora, losses
from modernbert_jax.checkpoint.pretrained import Pretrained

INSTALLED = """With a wheel, `python -m train X` and `python -m modernbert_jax X` are
`modernbert-jax X`, and `python -m convert X` is `modernbert-jax convert X`."""
PAGE = pathlib.Path(__file__).resolve().parents[1] / "notebooks" / "guides" / "reference.md"


def page() -> str:
    """Returns the complete page."""
    parts = [
        "# Reference",
        "`make reference` generates this page from the docstrings; edit those instead.",
    ]
    parts += [_doc(modernbert_jax), "## modernbert_jax"]
    aliases = []
    for name, value in vars(modernbert_jax).items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or value is Pretrained:
            continue
        if value.__name__ == name:
            parts += _public(name, value)
        else:
            aliases.append(f"- `{name}` is `{value.__name__}`")
    parts += ["### Names of transformers", "\n".join(aliases)]
    parts += ["### Every model: Pretrained", _doc(Pretrained), *_methods(Pretrained)]
    parts += ["### Model cards", _doc(card), *_public("model_card", card.model_card)]
    parts += ["## modernbert_jax.losses", _doc(losses)]
    for name, value in vars(losses).items():
        if inspect.isfunction(value) and value.__module__ == losses.__name__ and name[0] != "_":
            parts += _public(name, value)
    parts += ["## modernbert_jax.attention", _doc(attention)]
    for name in attention.__all__:
        parts += _public(name, getattr(attention, name))
    parts += ["## modernbert_jax.lora", _doc(lora)]
    for name in lora.__all__:
        if inspect.isfunction(value := getattr(lora, name)):
            parts += _public(name, value)
    parts += ["## Commands", INSTALLED, _doc(modernbert_jax.attention.__main__)]
    for cli in (modernbert_jax.inference.cli, convert.cli, train.cli):
        program = cli.__name__.split(".")[0]
        parts += [f"### python -m {program}", _commands(cli.main)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}"
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        yield from (_doc(value), _fields(value))
    else:
        made_by = value.__init__ if inspect.isclass(value) else value
        if made_by is not object.__init__:  # AutoTokenizer is never instantiated
            yield _signature(name, made_by)
        yield _doc(value)
    if inspect.isclass(value):
        yield from _methods(value)


def _methods(cls: type) -> Iterator[str]:
    """Yields what a class and its bases define, without what every model inherits."""
    bases = [c for c in cls.__mro__ if c is cls or c is not Pretrained]
    bases = [c for c in bases if c.__module__.startswith("modernbert_jax")]
    found = {name: value for base in reversed(bases) for name, value in vars(base).items()}
    for name, value in found.items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        hidden = name.startswith("_") and name != "__call__"
        if hidden or not inspect.isfunction(function) or not _doc(function):
            continue
        yield f"`.{name}`" if hasattr(value, "fget") else _signature(f".{name}", function)
        yield "\n".join(f"> {line}".rstrip() for line in _doc(function).splitlines())


def _signature(name: str, function: Any) -> str:
    """Returns the signature as written, because Python versions print types differently."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    node.args.args = [a for a in node.args.args if a.arg not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    text = f"{name}({ast.unparse(node.args)}){returns}"
    return f"```python\n{textwrap.fill(text, 96, subsequent_indent='    ')}\n```"


def _fields(cls: type) -> str:
    """Returns the fields of a dataclass as written, with their comments."""
    source = textwrap.dedent(inspect.getsource(cls))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    lines = source.splitlines()
    spans = [(n.lineno - 1, n.end_lineno) for n in node.body if isinstance(n, ast.AnnAssign)]
    fields = [textwrap.dedent("\n".join(lines[start:end])) for start, end in spans]
    return "```python\n" + "\n".join(fields) + "\n```"


def _doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _commands(main: Any) -> str:
    """Returns a table of the commands that --help lists."""
    with mock.patch.dict(os.environ, COLUMNS="200"), contextlib.suppress(SystemExit):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(["--help"])
    plain = re.sub("[│•]", " ", out.getvalue())  # tyro draws boxes
    found = re.findall(r"^ {2,6}(\w[\w-]*)(?: {2,}|\n {8,})(.+?) *$", plain, re.M)
    return "\n".join(
        ["| command | |", "|---|---|", *(f"| {name} | {text} |" for name, text in found)]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
