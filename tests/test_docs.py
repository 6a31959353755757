"""Runs every command and snippet in README.md, CONTRIBUTING.md and notebooks/, in a small form.

bash runs each shell block with stand-ins for all programs, which record their arguments. So bash
checks the syntax, and a program without a stand-in fails. Each recorded command then runs in this
process, with flags appended that make it small (SMALLER); a command without a rule fails. Words
that a reader replaces (DIR, FOLDER, notes/, ...) are small folders here. Commands inside a line of
prose are parsed, and run only if they are quick.
"""

import csv
import dataclasses
import gzip
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from starlette.testclient import TestClient

from convert import cli as convert_cli
from modernbert_jax import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM, cli as umbrella
from modernbert_jax.attention import __main__ as self_check
from modernbert_jax.checkpoint.orbax import save_orbax
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.inference import cli as library_cli
from modernbert_jax.inference.export import use_compile_cache
from modernbert_jax.serve import cli as serve_cli
from modernbert_jax.serve.app import Limits, Service
from modernbert_jax.serve.endpoints import endpoints_of
from train import cli
from train.corpora.build.bpe import train_bpe
from train.corpora.sources import sources
from train.corpora.synthetic import synthetic_notes
from train.finetune import retrieval, run as finetune
from train.plan import topologies
from train.pretrain import run as loop

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"
HUB_IDS = ("answerdotai/ModernBERT-base", "thomas-sounack/BioClinical-ModernBERT-base")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "notebooks" / "README.md",
    # test_reference.py tests the reference, which is generated from docstrings.
    *sorted(p for p in (ROOT / "notebooks/guides").glob("*.md") if p.stem != "reference"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*weights of the head are new"),
]
by_name = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)

# Programs that a document may use. Those in LAUNCHERS run others.
LAUNCHERS = ("srun", "mpirun", "nohup")
FOREIGN = ("git", "wget", "scontrol", "tail")  # not ours, or on the network: never run
PROGRAMS = (
    "curl",
    *("modernbert-jax", "python", "python3", "pip", "pytest", "make", "pre-commit"),
    *("gcloud", "sbatch", "bash"),
    *LAUNCHERS,
    *FOREIGN,
)
# Flags appended to a command to make it small; if a flag comes twice, the last one counts.
SMALL_RUN = (
    "--sequence-length 64 --global-batch-size 4 --gradient-accumulation-steps 2 --mesh.data 1 "
    "--eval-sequences 4 --synthetic-notes 200 "
    "--phases.0.tokens 600 --phases.0.warmup-tokens 0 --phases.1.tokens 500 "
    "--phases.1.decay-tokens 300 --eval-fraction 0.2 --attention xla "
    "--phases.0.mlm-probability 0.15 --phases.1.mlm-probability 0.15 "  # one program
    "--fill-mask 'It was [MASK].'"
)
SMALLER = {
    "pretrain": SMALL_RUN,
    "prepare": "--sequence-length 64 --eval-fraction 0.3 --workers 1",
    "decontaminate": "--workers 1",
    "finetune": "--epochs 1 --max-length 64",
    "plan": "--sequence-length 128 --global-batch-size 16 "
    "--phases.0.tokens 100000 --phases.1.tokens 100000 "
    "--phases.1.decay-tokens 1000 --model.hidden-size 64 --model.intermediate-size 64 "
    "--model.num-attention-heads 2 --model.num-hidden-layers 2 "
    "--model.layer-types full_attention sliding_attention",
    "modernbert_jax.attention": "--length 64",
}
# Flags that a single process on a CPU cannot use as written. Two hosts run in test_hosts.py, and
# every mesh in test_sharding.py.
REPLACED = {
    "--mesh.fsdp": "--mesh.fsdp 2",
    "--matryoshka-dims": "--matryoshka-dims 32 16 8",  # the model has 32
    "--hosts.count": "--hosts.count None --hosts.index None --hosts.coordinator None",
}


# Reading documents


@dataclasses.dataclass(frozen=True)
class Block:
    """Code in a document. kind: python, sh, bash (a complete script) or tree (list of folders)."""

    kind: str
    line: int
    text: str


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", re.M)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def blocks(document: Path) -> list[Block]:
    """Returns the fenced blocks and those indented by four spaces, in order."""
    text = document.read_text()
    found = []
    for match in FENCE.finditer(text):
        found.append(Block(match[1], text.count("\n", 0, match.start()) + 1, match[2]))
    blank = FENCE.sub(lambda m: re.sub(r"[^\n]", "", m[0]), text)
    for match in INDENTED.finditer(blank):
        code = re.sub(r"^ {4}", "", match[0], flags=re.M)
        kind = "tree" if (ROOT / code.split()[0]).is_dir() else "sh"
        found.append(Block(kind, text.count("\n", 0, match.start()) + 1, code))
    return sorted(found, key=lambda block: block.line)


def inline_commands(document: Path) -> list[str]:
    """Returns the code inside lines of prose that starts with a program."""
    text = INDENTED.sub("", FENCE.sub("", document.read_text()))
    spans = (" ".join(span.split()) for span in INLINE.findall(text))
    return [span for span in spans if span.split()[0] in PROGRAMS and " " in span]


# The folder in which commands run


NOTES = [note for note in synthetic_notes(60, seed=5)]


def write_table(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerows([header, *rows])


def write_downloads(folder: Path) -> None:
    """Writes small corpora in the layout of their owners, with synthetic text."""
    write_table(
        folder / "mtsamples" / "mtsamples.csv",
        ["", "description", "medical_specialty", "sample_name", "transcription", "keywords"],
        [[str(i), "d", "s", "n", note, "k"] for i, note in enumerate(NOTES[:20])],
    )
    names = "ROW_ID SUBJECT_ID HADM_ID CHARTDATE CHARTTIME STORETIME CATEGORY DESCRIPTION CGID"
    write_table(
        folder / "mimic3" / "NOTEEVENTS.csv",
        [*names.split(), "ISERROR", "TEXT"],
        [[str(i), *[""] * 5, "ECG", "Report", "", "", note] for i, note in enumerate(NOTES[20:40])],
    )
    articles = "".join(
        f'<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="1">{i}</PMID>'
        f'<Article PubModel="Print"><ArticleTitle>Title {i}.</ArticleTitle><Abstract>'
        f"<AbstractText>{' '.join(re.findall('[a-z]+', note))}.</AbstractText></Abstract></Article>"
        "</MedlineCitation></PubmedArticle>"
        for i, note in enumerate(NOTES[40:], start=1)
    )
    (folder / "pubmed").mkdir()
    with gzip.open(folder / "pubmed" / "pubmed26n0001.xml.gz", "wt") as file:
        file.write(f'<?xml version="1.0"?>\n<PubmedArticleSet>{articles}</PubmedArticleSet>\n')


def write_tasks(folder: Path) -> None:
    """Writes the files of the tasks that documents fine-tune on."""
    rows = [
        [
            str(i),
            "fever",
            f"Visit {i} {'denies' if i % 2 else 'has'} fever.",
            status,
            "Recent",
            "Pt",
        ]
        for i in range(24)
        for status in [("Affirmed", "Negated")[i % 2]]
    ]
    header = ["Number", "Condition", "Sentence", "Negation", "Temporality", "Experiencer"]
    write_table(folder / "negex" / "rsAnnotations-1-120-random.txt", header, rows, "\t")
    labels = ("CPR:3", "CPR:4", "CPR:5", "CPR:6", "CPR:9", "false")
    for split in ("train", "dev", "test"):
        rows = [[str(i), f"@CHEMICAL$ acts {i} @GENE$.", labels[i % 6]] for i in range(12)]
        write_table(
            folder / "chemprot" / f"{split}.tsv", ["index", "sentence", "label"], rows, "\t"
        )
    (folder / "deid").mkdir()
    for name, person in (("id.text", "Anna"), ("id.res", "[**First Name (STitle)**]")):
        records = (
            f"START_OF_RECORD={i}||||1||||\nPt {i} seen by {person} today.\n||||END_OF_RECORD\n"
            for i in range(20)
        )
        (folder / "deid" / name).write_text("".join(records))
    (folder / "retrieval").mkdir()
    write_lines = lambda name, lines: (folder / "retrieval" / name).write_text(  # noqa: E731
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    pairs = [{"query": f"fever {i}?", "positive": f"fever since day {i}"} for i in range(16)]
    write_lines("train.jsonl", pairs)
    write_lines("queries.jsonl", [{"_id": "q", "text": "fever 3?"}])
    write_lines("corpus.jsonl", [{"_id": f"d{i}", "text": f"fever since day {i}"} for i in (3, 5)])
    (folder / "retrieval" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    taught = {
        "mse": [{"text": pair["positive"]} for pair in pairs],
        "margin-mse": [pair | {"negative": "no fever"} for pair in pairs],
        "kl": [pair | {"negative": "no fever"} for pair in pairs],
    }
    for loss, lines in taught.items():  # of `--task retrieval --loss LOSS`
        (folder / f"retrieval-{loss}").mkdir()
        write_lines(f"../retrieval-{loss}/train.jsonl", lines)


def write_bert(folder: Path) -> None:
    """Writes a tiny BERT for the torch backend."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "acts"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))  # type: ignore
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with everything that documents name, and a hub cache with the published ids."""
    folder = tmp_path_factory.mktemp("things")
    (folder / "notes").mkdir()
    for i, note in enumerate(NOTES):
        (folder / "notes" / f"{i:02}.txt").write_text(note)
    write_table(folder / "notes.csv", ["id", "note_text"], [["x", note] for note in NOTES])
    write_table(folder / "test.csv", ["id", "text"], [["x", note] for note in NOTES[:3]])
    write_downloads(folder / "DOWNLOADS")
    write_tasks(folder / "tasks")

    tokenizer = (
        AutoTokenizer.from_pretrained(TOKENIZER) if TOKENIZER.is_dir() else train_bpe(NOTES, 400)
    )
    config = ModernBertConfig.tiny(
        vocab_size=50368, hidden_size=32, intermediate_size=24, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id,
        bos_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(folder / "CHECKPOINT", tokenizer=tokenizer)
    (folder / "CKPT").symlink_to("CHECKPOINT")
    for name in HUB_IDS:
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder / "CHECKPOINT", repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    params = flatten(model)
    moments = {key: np.full(value.shape, 1e-3, np.float32) for key, value in params.items()}
    save_orbax(
        folder / "base_context", architecture=type(model).__name__, config=config, params=params,
        optimizer={"step": 7, "mu": moments, "nu": moments}, tokenizer_dir=folder / "CHECKPOINT",
    )  # fmt: skip
    composer = ["to-composer", str(folder / "base_context"), str(folder / "ep0-ba52988-rank0.pt")]
    assert convert_cli.main([*composer, "--optimizer"]) == 0
    command = ["prepare", "--source", str(folder / "notes"), "--out", str(folder / "tokens")]
    command += ["--tokenizer", str(folder / "CHECKPOINT"), *SMALLER["prepare"].split()]
    assert cli.main(command) == 0
    return folder


class World:
    """A folder with what a document names, and rules that run the commands that it contains."""

    def __init__(self, document: Path, folder: Path, things: Path, full: bool):
        self.document, self.folder, self.things, self.full = document, folder, things, full
        self.text = document.read_text()
        self.ran: list[list[str]] = []
        links = {name: name for name in ("notes", "notes.csv", "test.csv", "DOWNLOADS")}
        links |= {name: name for name in ("CHECKPOINT", "CKPT", "ep0-ba52988-rank0.pt")}
        links |= {
            "TEACHER": "CHECKPOINT",
            "FOLDER": "notes",
            "tokens/bio": "tokens",
            "tokens/clinical": "tokens",
        }
        if "dmis-lab/biobert-v1.1" in self.text and full:
            # transformers ignores the hub cache that this file sets, but a folder has priority.
            write_bert(folder / "dmis-lab" / "biobert-v1.1")
        # The recipes of BioClinical ModernBERT start from this folder.
        links |= {"checkpoints/base_context": "base_context"}
        for name, target in links.items():
            made = any(f"{before} {name}" in self.text for before in ("--out", ".pt"))
            if not made and (name in self.text or name in ("notes", "checkpoints/base_context")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(things / target)
        (folder / "shared").mkdir()
        for name in ("tokens", "modernbert_jax"):
            (folder / "shared" / name).symlink_to(folder / name)
        stand_in = (
            "#!/bin/sh\n"
            '{ for word in "${0##*/}" "$@"; do printf \'%s\\037\' "$word"; done\n'
            "printf '\\036'; } >>\"$RECORD\"\n"
        )
        (folder / "stand-ins").mkdir()
        for name in PROGRAMS:
            (folder / "stand-ins" / name).write_text(stand_in)
            (folder / "stand-ins" / name).chmod(0o755)
        for place in (folder, folder / "modernbert_jax"):
            for venv in (".venv", ".venv-test"):
                (place / venv).mkdir(parents=True)
                (place / venv / "bin").symlink_to(folder / "stand-ins")

    def recorded(self, script: str) -> list[list[str]]:
        """Returns the arguments of each program that a script calls; the programs do nothing."""
        script = re.sub(r"(?<!\w)/shared", str(self.folder / "shared"), script)
        record = self.folder / "recorded"
        record.write_text("")
        env = {"PATH": str(self.folder / "stand-ins"), "RECORD": str(record)}
        env |= {"SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_RANK": "0"}
        bash = shutil.which("bash") or "bash"
        done = subprocess.run(
            [bash, "-euo", "pipefail", "-c", f"{script}\nwait"],
            cwd=self.folder, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        return [call.split("\037")[:-1] for call in record.read_text().split("\036")[:-1]]

    def filled(self, words: list[str]) -> list[str]:
        """Returns the arguments, with the words that a reader replaces filled in."""
        verb, out = words[0], []
        named = {flag: word for flag, word in zip(words, words[1:], strict=False)}
        kinds = {"prepare": ("DOWNLOADS", "--corpus"), "finetune": ("tasks", "--task")}
        folder, flag = kinds.get(verb, ("", ""))
        task = "-".join(named[name] for name in (flag, "--loss") if name in named)
        directory = str(self.things / folder / task) if flag else "notes/"
        for before, word in zip(["", *words], words, strict=False):
            if word == "..." and not before.startswith("--"):
                continue  # more arguments like the one before
            word = {"DIR": directory, "...": HUB_IDS[0]}.get(word, word)
            out.append(word.replace("gs://BUCKET", str(self.folder / "bucket")))
        return out

    def run(self, call: list[str]) -> None:
        """Runs or parses a command, unless it was run before; fails if there is no rule for it."""
        if call in self.ran:
            return
        self.ran.append(call)
        match call:
            case ["python" | "python3", "-m", "train", *words]:
                self.train(words)
            case ["python", "-m", "train.plan.install_cuda", "--target", _]:
                pass  # 400 MB; test_plan.py runs it
            case ["python", "-m", "tests.benchmarks.kernel_table"]:
                pass  # it compiles for minutes
            case ["python", "-m", "convert", *words]:
                if words[0] == "check" and not self.full:  # slow: it loads torch
                    convert_cli.parse(words)
                else:
                    done(convert_cli.main, words)
            case ["python", "-m", "modernbert_jax.attention", *words]:
                more = SMALLER["modernbert_jax.attention"].split() if self.full else ["--help"]
                done(self_check.main, [*words, *more])
            case ["python", "-m", "modernbert_jax", *words]:
                if self.full or "--help" in words:
                    done(library_cli.main, words)
                else:
                    library_cli.parser().parse_args(words)
            case ["modernbert-jax", "--help"]:
                done(umbrella.main, ["--help"])
            case ["modernbert-jax", "serve", *words]:
                self.serve(words)
            case ["curl", "-s", *words]:
                self.request(words)
            case ["modernbert-jax", command, *words]:  # as modernbert_jax/cli.py runs it
                package = umbrella.COMMANDS[command][0]
                self.run(
                    ["python", "-m", package, *([] if command == package else [command]), *words]
                )
            case ["python" | "python3", "-m", "pip" | "uv" | "pytest" as program, *words]:
                self.run(["pip" if program == "uv" else program, *words])
            case ["pip", "venv", *_]:
                pass
            case ["pip", *words] if "install" in words:
                self.check_extras(words)
            case ["pytest", *words]:
                for word in words:
                    assert not word.endswith(".py") or "def test" in (ROOT / word).read_text()
            case ["python", "-m", module, *words] if module.startswith("tests.benchmarks."):
                self.run(["python", f"{module.replace('.', '/')}.py", *words])
            case ["python", script, *words] if script.endswith(".py"):
                source = (ROOT / script).read_text()
                flags = [word for word in words if word.startswith("--")]
                assert all(f'"{flag}"' in source for flag in flags), f"{script}: {flags}"
            case ["make", *targets]:
                subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
            case ["pre-commit", "install"]:
                assert (ROOT / ".pre-commit-config.yaml").exists()
            case ["gcloud", *words]:
                self.gcloud(words)
            case ["sbatch", script]:
                assert f"`{script}`" in self.text, f"the document does not show {script}"
            case ["bash", "-c", script]:
                self.run_all(script)
            case [program, *words] if program in LAUNCHERS:
                names = [word.rpartition("/")[2] for word in words]
                first = next(i for i, name in enumerate(names) if name in PROGRAMS)
                self.run_all(shlex.join(words[first:]))
            case [program, *_] if program in FOREIGN:
                pass
            case _:
                pytest.fail(f"no rule in tests/test_docs.py runs: {shlex.join(call)}")

    def run_all(self, script: str) -> None:
        for call in self.recorded(script):
            self.run(call)

    def train(self, words: list[str]) -> None:
        words = self.filled(words)
        verb = words[0] if words else ""
        more = SMALLER.get(verb, "")
        for flag, instead in REPLACED.items():
            more += f" {instead}" if flag in words else ""
        if verb == "pretrain" and "continue" in words:  # three epochs would be 300 steps
            more += " --epochs 0.2" if "--epochs" in words else " --epochs 0.1"
        compiles = importlib.util.find_spec("libtpu") and "--cuda-compiler" not in words
        if verb == "plan" and not (self.full and compiles):
            cli.plan_arguments(words[1:], "plan")[2].validate()
        else:
            help_alone = ["--help"] if "--help" in words else []
            done(cli.main, [*words, *shlex.split(more), *help_alone] if self.full else words)

    def check_extras(self, words: list[str]) -> None:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words:
            for extra in re.findall(r"\.\[(.*)\]", word):
                assert set(extra.split(",")) <= set(known["optional-dependencies"]), word

    def serve(self, words: list[str]) -> None:
        """Loads what the command serves, for the requests that follow. Its process never ends."""
        args = serve_cli.parser().parse_args(words)
        if self.full:
            runner, reranker = serve_cli.load(args)
            name = args.name or Path(args.model).name
            endpoints, missing = endpoints_of(runner, name, 512, reranker)
            service = Service(endpoints, missing, Limits(512, 65536))
            self.client = TestClient(service.app, base_url="http://localhost:8000")

    def request(self, words: list[str]) -> None:
        """Sends a request to the server that the document started last; it must succeed."""
        (url,) = (word for word in words if word.startswith("localhost:8000/"))
        named = {flag: word for flag, word in zip(words, words[1:], strict=False)}
        assert set(words) <= {url, "-H", named.get("-H"), "-d", named.get("-d")}, words
        content = {"Content-Type": "application/json"}
        response = (
            self.client.post(f"http://{url}", content=named["-d"], headers=content)
            if "-d" in named
            else self.client.get(f"http://{url}")
        )
        assert response.status_code == 200, response.text

    def gcloud(self, words: list[str]) -> None:
        """Checks the verb, and runs what --command runs on the hosts."""
        verbs = {"create", "ssh", "describe", "delete", "cp", "cat"}
        assert verbs & set(words[:4]), words
        if "--command" in words:
            self.run_all(words[words.index("--command") + 1])


def done(main, words: list[str]) -> None:
    """Runs a command line in this process."""
    try:
        code = main(words)
    except SystemExit as left:  # --help
        code = left.code or 0
    assert code == 0, shlex.join(words)


# The tests


@pytest.fixture
def enter(tmp_path, things, monkeypatch):
    """Makes the World of a document and enters it; full=False only parses slow commands."""

    def make(document: Path, full: bool) -> World:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(things / "hub"))
        if not full:
            for module, name in ((loop, "run"), (finetune, "finetune"), (retrieval, "train")):
                monkeypatch.setattr(module, name, lambda config, **_: config.validate())
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that a command starts
        jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
        return World(document, tmp_path, things, full)

    yield make
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)  # set by --compile-cache
    compilation_cache.reset_cache()


def run_document(world: World) -> None:
    names: dict = {"path": HUB_IDS[0], "__name__": "document"}
    for block in blocks(world.document):
        where = f"{world.document.name}, line {block.line}"
        if block.kind == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.kind in ("sh", "bash"):
            world.run_all(block.text)
        elif block.kind == "tree":
            for line in block.text.splitlines():
                assert line.startswith(" ") or (ROOT / line.split()[0]).exists(), f"{where}: {line}"
        else:
            pytest.fail(f"{where}: expected a block of python, sh or bash, got {block.kind!r}")


@by_name
def test_blocks(document, enter, things, monkeypatch):
    for name, value in topologies.environment(
        "v5e"
    ).items():  # so that plan does not start a new process
        monkeypatch.setenv(name, value)
    use_compile_cache(things / "compiled")  # documents run the same recipes repeatedly
    run_document(enter(document, full=True))


@by_name
def test_commands_in_prose(document, enter):
    world = enter(document, full=False)
    for command in inline_commands(document):
        command = re.sub(r" \.\.\.$", " --help", command).replace("--config NAME", "--config demo")
        world.run_all(command.replace("--task NAME", "--task negex --data DIR --model CHECKPOINT"))


@by_name
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


def test_no_command_escapes(tmp_path, things):
    """Unknown programs, commands, flags, extras, files and languages all fail."""
    document = tmp_path / "guide.md"
    bad = [
        "```sh\ntelnet x\n```\n",
        "```sh\ncurl x\n```\n",
        "```sh\npython -m nothing\n```\n",
        "```yaml\na: b\n```\n",
    ]
    bad += ["```sh\npython -m train pretrain --no-such-flag 3\n```\n", "\n\n    unknown x\n"]
    bad += ["```sh\npip install -e '.[nothing]'\n```\n", "```sh\npytest tests/none.py\n```\n"]
    for number, text in enumerate(bad):
        document.write_text(text)
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
            run_document(World(document, folder, things, full=False))


def test_the_table_of_corpora_is_current():
    rows = ["| `--corpus` | what | access | license | where | files |", "|---|---|---|---|---|---|"]
    for source in sources():
        if source.kind != "generic":
            cells = (source.name, source.title, source.access, source.license)
            files = " ".join(f"`{name}`" for name in source.files)
            rows.append(f"| {' | '.join(cells)} | <{source.homepage}> | {files} |")
    found = (ROOT / "notebooks" / "guides" / "data_access.md").read_text()
    assert "\n".join(rows) in found, "expected this table:\n" + "\n".join(rows)
