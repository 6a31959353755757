"""python notebooks/execute.py [NAME ...]: executes notebooks from their .py and writes the .ipynb.

People edit and review the .py (jupytext's py:percent); this program generates the .ipynb, which is
never edited by hand. A notebook runs in an empty folder, so it depends on no file and leaves none.
The outputs are the same on every machine: they contain no paths, no times of cells and no progress
bars, and pictures have few colors.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """Returns the .py files of the notebooks, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def run(source: Path, folder: Path, timeout: int = 600) -> NotebookNode:
    """Executes a .py in `folder` and returns the notebook with its outputs, tidied.

    timeout: seconds per cell. Unless MODERNBERT_REAL is set, the hub is offline and JAX uses the
    CPU. Raises nbclient's CellExecutionError, which holds the cell and its traceback.
    """
    notebook = jupytext.read(source)
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(FOLDER.parent), os.getenv("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",
        "TPU_SKIP_MDS_QUERY": "1",  # do not query a metadata server
    }
    if not os.environ.get("MODERNBERT_REAL"):
        settings |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
        )
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return tidy(notebook, folder)


def tidy(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Removes what differs between machines; see the module."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _text(output.text, folder)
                if not output.text.strip():
                    continue
                if outputs and outputs[-1].get("name") == output.name:
                    outputs[-1].text += output.text
                    continue
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _text(value, folder)
                elif kind == "image/png":
                    output.data[kind] = _smaller(value)
            outputs.append(output)
        cell.outputs = outputs
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return notebook


def _text(text: str, folder: Path) -> str:
    """Removes progress, times and a warning about widgets, and replaces the folder with "."."""
    text = _TIMES.sub("", _WIDGETS.sub("", text))
    text = "".join(line for line in text.splitlines(keepends=True) if not _BAR.search(line))
    for path in (folder.resolve(), folder, FOLDER.parent):
        text = text.replace(str(path), ".")
    return text


def _smaller(png: str) -> str:
    """Returns the picture in 64 colors, which has a third of the bytes and looks the same."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        few = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    made = io.BytesIO()
    few.save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode() + "\n"


_BAR = re.compile(r"\r|\[\d+:\d+(<[\d:?]+)?, ")
_TIMES = re.compile(r"^about .* of training remain: .*\n", re.MULTILINE)
_WIDGETS = re.compile(r".*TqdmWarning: IProgress.*\n.*autonotebook.*\n")


def main(argv: list[str]) -> int:
    """Executes the named notebooks, or all of them, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="for example 01_fill_mask; all by default")
    names = parser.parse_args(argv).names
    known: dict[str, Path] = {source.stem: source for source in sources()}
    if unknown := sorted(set(names) - set(known)):
        print(f"error: expected {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    for name in names or known:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook: Any = run(known[name], Path(folder))
        target = known[name].with_suffix(".ipynb")
        nbformat.write(notebook, target)
        seconds, size = time.monotonic() - started, target.stat().st_size
        print(f"{target.name}: {seconds:.0f} s, {size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
