"""Rules for every file: the direction of imports, the layout, the versions.

Which package may import which is written in pyproject.toml, [tool.importlinter].
"""

import ast
import importlib
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import grimp
import pytest

import modernbert_jax
from modernbert_jax import cli

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("modernbert_jax", "train", "convert")
# Reading with any of these can run what the file says. `convert` only checks names with pickle.
RUNS_FILES = {"_pickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RUNS_TEXT = {"__import__", "eval", "exec", "import_module", "importlib.import_module"}

# Distributions whose module has another name, and those that another library imports for us.
MODULES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
NOT_IMPORTED = {"flatbuffers"}  # jax.export needs it and does not require it

REQUIRED = [
    ".ci/run",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "convert/__main__.py",
    "modernbert_jax/__init__.py",
    "pyproject.toml",
    "tests/conftest.py",
    "train/__main__.py",
]
OPTIONAL_TOP_LEVEL = {"notebooks"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package}/ holds no Python file"
    return found


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names of the absolute imports of a file, wherever they stand, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], node.lineno


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls of a file, each with what is called as it is written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def tracked_files() -> list[Path]:
    """Every file that git holds or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_import_contracts():
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as main; main()",
    ]
    done = subprocess.run(
        [*command, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_library_loads_nothing_of_training_or_conversion():
    code = """if True:
        import pkgutil, sys
        import modernbert_jax
        for module in pkgutil.walk_packages(modernbert_jax.__path__, "modernbert_jax."):
            if not module.name.endswith("__main__"):
                __import__(module.name)
        optional = {"grain", "pandas", "sklearn", "tensorflow", "tensorflow_datasets", "torch"}
        optional |= {"qwix", "transformers", "tyro"}  # flax itself imports optax
        print(*(optional & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["train", "convert"])
def test_siblings_are_imported_relatively(package):
    absolute = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(package)
        for name, line in imported(path)
        if name == package
    ]
    assert not absolute


def test_library_runs_nothing_from_a_file():
    found = []
    for path in sources("modernbert_jax"):
        if path.name == "cli.py":  # imports the modules that its own table names
            continue
        where = path.relative_to(ROOT)
        found += [f"{where}:{line} {name}" for name, line in imported(path) if name in RUNS_FILES]
        for name, call in calls(path):
            keywords = {keyword.arg for keyword in call.keywords}
            if name in RUNS_TEXT or "allow_pickle" in keywords:
                found.append(f"{where}:{call.lineno} {name}")
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_main_only_calls_cli(package):
    path = ROOT / package / "__main__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.If | ast.Raise)
    names = {name for name, _ in calls(path)}
    assert names & {"cli.main", "main", "program"}
    assert names <= {"SystemExit", "cli.main", "leave", "main", "program", "sys.exit"}


def test_the_umbrella_command_lists_every_verb():
    verbs = importlib.import_module("train.cli").VERBS
    listed = [name for name, (package, _) in cli.COMMANDS.items() if package == "train"]
    assert listed == [verb.__name__ for verb in verbs]


def test_top_level_is_the_agreed_one():
    missing = [name for name in REQUIRED if not (ROOT / name).is_file()]
    assert not missing
    allowed = {name.split("/")[0] for name in REQUIRED} | OPTIONAL_TOP_LEVEL
    present = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert not {name for name in present - allowed if not name.startswith(".")}


def test_tests_are_flat():
    named_like_packages = [ROOT / "tests" / package for package in PACKAGES]
    assert not [path for path in named_like_packages if path.exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_names_a_machine_or_an_index():
    # Written in halves, so that this file does not find itself.
    folders = ["/" + name + "/" for name in ("root", "home/[^/]+", "Users/[^/]+", "opt", "work")]
    hosts = [name + r"\." + end for name, end in [("pypi", "org"), ("pythonhosted", "org")]]
    hosts += [r"registry\.npm" + r"js\.org", r"download\.py" + r"torch\.org", "index" + "-url"]
    here = [re.escape(str(path)) + "/" for path in (ROOT.parent, Path.home()) if path != Path("/")]
    pattern = re.compile(rf"(?<![\w.:/])({'|'.join(folders + here)})|{'|'.join(hosts)}")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # not text
            continue
        for number, line in enumerate(lines, start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number} {match.group()}")
    assert not found


def test_changelog_begins_with_this_version():
    headings = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert headings[0] == modernbert_jax.__version__


def test_declared_dependencies_are_the_imports():
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    ours = {name for name in graph.modules if name.split(".")[0] in PACKAGES}

    def imports(package: str) -> set[str]:
        modules = [name for name in ours if name.split(".")[0] == package]
        found = set().union(*(graph.find_modules_directly_imported_by(name) for name in modules))
        return {name.split(".")[0] for name in found - ours} - sys.stdlib_module_names

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def declared(requirements: list[str]) -> set[str]:
        """The modules that these distributions provide."""
        names = {re.split(r"[ ;<>=\[]", requirement)[0] for requirement in requirements}
        return {
            MODULES.get(name, name.replace("-", "_")) for name in names if name not in NOT_IMPORTED
        }

    library = declared(project["dependencies"])
    assert imports("modernbert_jax") == library | declared(extras["serve"] + extras["int8"])
    # What one flag asks for is imported there. Which build of torch is the user's choice.
    chosen = {"torch", "wandb", "sentence_transformers"}
    elsewhere = declared(extras["beam"] + extras["huggingface"]) | chosen
    train = declared(extras["train"])
    assert train <= imports("train") <= library | train | elsewhere
    convert = declared(extras["convert"])
    assert convert <= imports("convert") <= library | convert | {"torch"}
    assert "torch" not in declared(project["dependencies"] + extras["train"] + extras["convert"])


def test_the_two_version_pairs():
    def numbers(package: str) -> tuple[int, ...]:
        return tuple(int(number) for number in version(package).split(".")[:3])

    jax_version, flax_version = numbers("jax"), numbers("flax")
    if sys.version_info < (3, 12):
        assert (0, 10) <= jax_version < (0, 11)
        assert flax_version == (0, 12, 8)
        # Without these every parity test would skip unseen.
        assert version("torch").split("+")[0] == "2.13.0"
        assert version("torch-optimi")
        assert version("transformers")
        assert version("mteb")
        if sys.platform == "linux" and platform.machine() == "x86_64":  # as pyproject.toml has it
            assert version("libtpu")  # without it the TPU kernels' compilation would skip
    else:
        assert jax_version >= (0, 11, 1)
        assert flax_version >= (0, 12, 9)
