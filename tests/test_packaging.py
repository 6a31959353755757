"""What a user installs: the sdist, the wheel at work without the checkout, and CITATION.cff."""

import email
import os
import pathlib
import subprocess
import sys
import tarfile
import venv
import zipfile

import build
import jupytext
import pytest
import yaml

import modernbert_jax
from modernbert_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.optimized
GOLDEN = ROOT / "tests" / "goldens" / "tiny"

# Run with the wheel's folder first on the path and a JAX platform that does not exist, so that an
# import that touches a device fails.
LIBRARY = """
import pathlib, sys
folder, golden, version = sys.argv[1:]
import modernbert_jax

package = pathlib.Path(modernbert_jax.__file__).parent
assert package == pathlib.Path(folder) / "modernbert_jax", f"imported {package}"
assert modernbert_jax.__version__ == version, modernbert_jax.__version__
assert (package / "py.typed").is_file()
# What belongs to training, conversion and the reference. (flax itself imports optax.)
strangers = {"grain", "matplotlib", "tensorflow", "torch", "transformers", "tyro"}
assert not strangers & set(sys.modules), strangers & set(sys.modules)

import jax, numpy as np
try:
    jax.devices()
except RuntimeError:
    jax.config.update("jax_platforms", "cpu")
else:
    raise AssertionError("a platform that does not exist was not noticed")
expected = np.load(golden + "/expected.npz")
model = modernbert_jax.AutoModelForMaskedLM.from_pretrained(golden)
logits = model(expected["input_ids"], expected["attention_mask"]).logits
used = expected["attention_mask"].astype(bool)
error = np.abs(np.asarray(logits) - expected["logits"])[used].max()
assert error < 1e-5 * np.abs(expected["logits"][used]).max(), error
"""

# Every command prints its help, and a checkpoint is converted, with the wheel first on the path.
COMMANDS = """
import contextlib, io, pathlib, sys
folder, golden = sys.argv[1:]
from modernbert_jax import cli

for command, (package, _) in cli.COMMANDS.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = cli.main([command, "--help"])
        except SystemExit as exit:
            code = exit.code
    assert code in (0, None) and "usage" in out.getvalue(), (command, code, out.getvalue())
for package in ("train", "convert"):
    assert package not in sys.modules, f"{package} was imported from the checkout"
    found = pathlib.Path(sys.modules[f"modernbert_jax.{package}.cli"].__file__)
    assert found == pathlib.Path(folder) / "modernbert_jax" / package / "cli.py", found
assert cli.main(["convert", "from-hf", golden, "orbax"]) == 0
assert pathlib.Path("orbax/params").is_dir()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """(sdist, wheel of the checkout, wheel of the sdist), built as `python -m build` does."""
    out = tmp_path_factory.mktemp("dist")
    sdist = build.ProjectBuilder(ROOT).build("sdist", out)
    wheel = build.ProjectBuilder(ROOT).build("wheel", out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    again = build.ProjectBuilder(unpacked).build("wheel", out / "again")
    return pathlib.Path(sdist), pathlib.Path(wheel), pathlib.Path(again)


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_package_and_the_license(built):
    files = contents(built[1])
    info = f"modernbert_jax-{modernbert_jax.__version__}.dist-info"
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    wanted = {f"{info}/{name}" for name in names}
    for package, inside in [
        ("modernbert_jax", "modernbert_jax"),
        ("train", "modernbert_jax/train"),
        ("convert", "modernbert_jax/convert"),
    ]:
        found = [path for path in (ROOT / package).rglob("*") if "__pycache__" not in path.parts]
        wanted |= {
            f"{inside}/{p.relative_to(ROOT / package).as_posix()}" for p in found if p.is_file()
        }
    assert set(files) == wanted
    assert files["modernbert_jax/py.typed"] == b""
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"modernbert-jax = modernbert_jax.cli:program" in files[f"{info}/entry_points.txt"]


def test_the_sdist_makes_the_same_wheel(built):
    assert contents(built[1]) == contents(built[2])


def test_metadata(built):
    files = contents(built[1])
    (name,) = (name for name in files if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(files[name])
    assert metadata["Name"] == "modernbert_jax"
    assert metadata["Version"] == modernbert_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert {"train", "convert", "tpu", "cuda"} <= set(metadata.get_all("Provides-Extra", []))
    assert any("Python :: 3" in line for line in metadata.get_all("Classifier", []))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> pathlib.Path:
    """A folder that holds the unpacked wheel. Its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(built[1])]
    subprocess.run(pip, check=True, cwd=folder, timeout=120)
    return folder


def run_installed(folder: pathlib.Path, cwd: pathlib.Path, code: str, *args: str, platform: str):
    # PYTHONPATH comes before the checkout that an editable install adds.
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "JAX_PLATFORMS": platform,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code, str(folder), str(GOLDEN), *args],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_installed_library(installed, tmp_path):
    version = modernbert_jax.__version__
    run_installed(installed, tmp_path, LIBRARY, version, platform="no_such_platform")


def test_the_installed_commands(installed, tmp_path):
    run_installed(installed, tmp_path, COMMANDS, platform="cpu")


@pytest.mark.slow
def test_an_empty_environment(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    bin = tmp_path / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    work = tmp_path / "work"
    work.mkdir()

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=work, env=environment, check=True, text=True, timeout=1200,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    # The first cell of a notebook installs the wheel and finds `train` in it.
    cell = jupytext.read(ROOT / "notebooks" / "01_fill_mask.py").cells[1].source
    assert 'SOURCE = "..."' in cell
    cell = cell.replace('SOURCE = "..."', f"SOURCE = {built[1].as_uri()!r}")
    check = "\nimport train.configs\nprint(train.configs.__file__)"
    shown = run(str(bin / "python"), "-c", cell + check)
    assert str(tmp_path / "venv") in shown.splitlines()[-1]
    command = str(bin / "modernbert-jax")
    run(
        command, *"pretrain --config demo --sequence-length 64 --global-batch-size 8".split(),
        *"--synthetic-notes 200 --phases.0.tokens 3000 --phases.1.tokens 3000".split(),
        *"--phases.0.warmup-tokens 0 --phases.1.decay-tokens 3000 --eval-sequences 4".split(),
    )  # fmt: skip
    assert (work / "runs/demo/export/model.safetensors").is_file()
    assert "pubmed" in run(command, "corpora")


@pytest.mark.parametrize(
    "command, module, extra",
    [
        (["pretrain", "--config", "demo"], "tyro", "train"),
        (["prepare", "--corpus", "pubmed"], "apache_beam", "beam"),
        (["convert", "from-hf", "a", "b"], "orbax", "convert"),
    ],
)
def test_a_missing_extra_is_one_line(command, module, extra, monkeypatch, capsys):
    def imports_it(args):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setitem(sys.modules, module, None)  # the import raises
    if module == "tyro":
        monkeypatch.delitem(sys.modules, "train.cli", raising=False)
    else:
        monkeypatch.setattr("convert.cli.main", imports_it)
        monkeypatch.setattr("train.cli.main", imports_it)
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f'modernbert-jax {command[0]} needs the extra "{extra}" (found no module {module}): '
        f'pip install "modernbert_jax[{extra}]"'
    )


def test_a_broken_module_of_ours_is_not_called_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "train.cli", None)
    with pytest.raises(ModuleNotFoundError, match="train.cli"):
        cli.main(["pretrain"])


def test_the_command_line(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{modernbert_jax.__version__}\n"
    assert cli.main(["pretain"]) == 2
    assert "got 'pretain'" in capsys.readouterr().err


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # required by the format
    assert citation["version"] == modernbert_jax.__version__
    assert citation["license"] == "Apache-2.0"
    papers = {
        reference["identifiers"][0]["value"]: reference for reference in citation["references"]
    }
    assert set(papers) == {"arXiv:2412.13663", "arXiv:2506.10896"}
    for identifier, paper in papers.items():
        assert {"type", "title", "authors"} <= set(paper)
        assert paper["url"].endswith(identifier.removeprefix("arXiv:"))
        assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])
    firsts = {p["authors"][0]["family-names"]: p["year"] for p in papers.values()}
    assert firsts == {"Warner": 2024, "Sounack": 2025}


def test_benchmarks_do_not_shadow_the_standard_library():
    """A script's folder comes first on the path: a tokenize.py there breaks `import numpy`."""
    names = {path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")}
    assert "model" in names
    assert not names & sys.stdlib_module_names
