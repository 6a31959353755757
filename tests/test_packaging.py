"""What a user installs: sdist and wheel, the wheel at work without the checkout, CITATION.cff."""

import email
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import build
import pytest
import yaml

import modernbert_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "tiny"

# Run with the wheel's folder first on the path and a JAX platform that does not exist: the import
# would fail where it touched a device.
INSTALLED = """
import pathlib, sys
folder, golden, version = sys.argv[1:]
import modernbert_jax

package = pathlib.Path(modernbert_jax.__file__).parent
assert package == pathlib.Path(folder) / "modernbert_jax", f"imported {package}"
assert modernbert_jax.__version__ == version, modernbert_jax.__version__
assert (package / "py.typed").is_file()
# What belongs to training, conversion and the reference. (flax itself brings optax.)
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


def test_the_wheel_is_the_library_and_its_licence(built):
    files = contents(built[1])
    info = f"modernbert_jax-{modernbert_jax.__version__}.dist-info"
    package = [p for p in (ROOT / "modernbert_jax").rglob("*") if "__pycache__" not in p.parts]
    wanted = {p.relative_to(ROOT).as_posix() for p in package if p.is_file()}
    wanted |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert set(files) == wanted
    assert files["modernbert_jax/py.typed"] == b""
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


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


def test_installed_from_another_directory(built, tmp_path):
    folder = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(built[1])]
    subprocess.run(pip, check=True, cwd=tmp_path, timeout=120)
    # PYTHONPATH comes before the checkout that an editable install adds.
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "JAX_PLATFORMS": "no_such_platform",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-W", "error", "-c", INSTALLED]
    done = subprocess.run(
        [*command, str(folder), str(GOLDEN), modernbert_jax.__version__],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # what the format asks for
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
