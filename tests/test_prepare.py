"""Both stages of `prepare`: what is kept, same bytes, restarts, refusals, real corpora."""

import csv
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from array_record.python.array_record_module import ArrayRecordReader

from modernbert_jax.tokenizer import AutoTokenizer, backend_json, fingerprint
from train import cli
from train.common import parallel
from train.corpora.build import (
    dataset as builder,
    dedupe,
    prepare as stages,
    reading,
    tokenize,
)
from train.corpora.build.bpe import train_bpe
from train.corpora.build.prepare import prepare
from train.corpora.reports.catalogue import catalogue
from train.corpora.source import Example, Revisions, Source, records_of
from train.corpora.sources import find, generic, sources
from train.corpora.synthetic import synthetic_notes
from train.tokens.store import open_store

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECRET = "Xylographistan"  # stands for a person's text
FEATURES = ("id", "meta", "source", "text")
LENGTH = 64  # tokens in a chunk at most
FRACTION = 0.1  # of documents in the evaluation split


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(synthetic_notes(200, seed=3), 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def shrink(patch):
    """Many jobs, shards and partitions from little text."""
    patch.setattr(reading, "JOB_BYTES", 5_000)
    patch.setattr(builder, "SHARD_BYTES", 20_000)
    patch.setattr(dedupe, "AT_ONCE", 7)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder of 30 tables, some of whose notes come again; and all texts in their order."""
    folder = tmp_path_factory.mktemp("notes")
    texts = list(synthetic_notes(84, seed=7))
    groups = [texts[i : i + 3] for i in range(0, 84, 3)]
    groups += [[texts[3], f"{SECRET} met a note.", texts[50]], [texts[3], "", texts[8]]]
    for number, group in enumerate(groups):
        with (folder / f"{number:02d}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *(["x", note] for note in group)])
    return folder, [note for group in groups for note in group]


def run(source, tokenizer, out, **changes) -> str:
    settings = {"sequence_length": LENGTH, "eval_fraction": FRACTION, "workers": 1} | changes
    return prepare(str(source), tokenizer, str(out), **settings)


def shards(out: pathlib.Path) -> dict[str, str]:
    """sha256 of every file without times in it."""
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def manifest(out: pathlib.Path, stage: str) -> dict:
    return json.loads((out / stage / "manifest.json").read_text())


@pytest.fixture(scope="module")
def made(notes, tokenizer, tmp_path_factory):
    """An uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        line = run(notes[0], tokenizer, out)
    return out, line


def split_of(text: str, eval_fraction: float) -> str:
    """The rule, on its own: the first 8 bytes of a text's sha256, as a share of 2**64."""
    digest = hashlib.sha256(text.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") / 2**64 < eval_fraction else "train"


def test_splits_are_stable_and_near_the_fraction():
    notes = [f"note {i}" for i in range(20_000)]
    keys = np.array([dedupe.key_of(note) for note in notes], dedupe.KEY)
    small, large, none = (dedupe.is_eval(keys["high"], share) for share in (0.05, 0.1, 0.0))
    # Binomial: mean 1000, standard deviation 31.
    assert 875 < small.sum() < 1125 and not none.any()
    assert (small <= large).all() and small.sum() < large.sum()
    assert small.tolist() == [split_of(note, 0.05) == "eval" for note in notes]
    # The first 8 bytes of its sha256 are 0.89935 of 2**64, on every machine and in every version.
    high = dedupe.key_of("note 0")[0]
    assert (dedupe.is_eval(high, 0.8993), dedupe.is_eval(high, 0.8994)) == (False, True)


def test_canonical_equivalents_are_one_text():
    """In either form; what NFC keeps has the key of its bytes, so its split stays."""
    for text in ("Fièvre 39 °C, Ångström", "한국어 Ấ"):
        nfc, nfd = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert nfc != nfd and dedupe.key_of(nfc) == dedupe.key_of(nfd)
        digest = hashlib.sha256(nfc.encode()).digest()
        assert dedupe.key_of(nfd)[:2] == tuple(np.frombuffer(digest, ">u8")[:2].tolist())


def test_first_of_each_against_a_set(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    files, expected, seen = [], [], set()
    for number in range(4):
        texts = [str(n) for n in rng.integers(0, 60, number * 20)]
        keys = np.array([dedupe.key_of(t) for t in texts], dedupe.KEY)
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], keys)
        expected.append([t not in seen and not seen.add(t) for t in texts])
    for at_once in (1, 13, 10**6):
        monkeypatch.setattr(dedupe, "AT_ONCE", at_once)
        assert [mask.tolist() for mask in dedupe.first_of_each(files)] == expected


class TestWhatIsMade:
    def test_chunks_against_tokenizers_alone(self, made, notes, tokenizer):
        """Every unique text once, in order, in its split, cut where it must be, with a blank."""
        content = json.loads((pathlib.Path(tokenizer) / "tokenizer.json").read_text())
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        wanted = {"train": [], "eval": []}
        for text in dict.fromkeys(filter(None, notes[1])):
            ids = backend.encode(" " + text, add_special_tokens=False).ids
            for i in range(0, len(ids), LENGTH - 2):
                wanted[split_of(text, FRACTION)].append([cls, *ids[i : i + LENGTH - 2], sep])
        for where in (made[0], made[0] / "tokens"):
            stores = open_store(where)
            for split, chunks in wanted.items():
                store = stores[split]
                got = store.read(np.arange(len(store.lengths)))
                assert [chunk.tolist() for chunk in got] == chunks
                assert len(chunks) > 5
                assert store.lengths.tolist() == [len(chunk) for chunk in chunks]

    def test_special_tokens_in_documents_are_text(self, tokenizer, tmp_path):
        text = "The plan:[MASK] no fever [SEP] [CLS]rash [PAD]"
        source = tmp_path / "notes.jsonl"
        source.write_text("".join(json.dumps({"text": text + end}) + "\n" for end in ("", ".")))
        run(source, tokenizer, tmp_path / "out", eval_fraction=0.0, corpus="jsonl")
        content = json.loads((pathlib.Path(tokenizer) / "tokenizer.json").read_text())
        plain = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        cls, sep = (plain.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        store = open_store(tmp_path / "out")["train"]
        chunks = [chunk.tolist() for chunk in store.read(np.arange(len(store.lengths)))]
        encode = lambda text: plain.encode(f" {text}", add_special_tokens=False).ids  # noqa: E731
        assert sorted(chunks) == sorted([cls, *encode(text + end), sep] for end in ("", "."))

    def test_space_before_chunks(self, notes, tokenizer, tmp_path):
        """Against the steps of convert_dataset_to_mds, with transformers' tokenizer."""
        long = " ".join(notes[1][:2]) + " naïve café " * 9
        source = tmp_path / "notes.jsonl"
        source.write_text(json.dumps({"text": long}) + "\n")
        options = {"eval_fraction": 0.0, "corpus": "jsonl", "space_before_chunks": True}
        run(source, tokenizer, tmp_path / "out", **options)
        theirs = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
        ids, want = theirs.encode(long, add_special_tokens=False), []
        while ids:
            part, ids = ids[: LENGTH - 2], ids[LENGTH - 2 :]
            first = theirs.encode(" " + theirs.decode(part[0]), add_special_tokens=False)
            want.append([theirs.cls_token_id, *first, *part[1:], theirs.sep_token_id])
        store = open_store(tmp_path / "out")["train"]
        got = store.read(np.arange(len(store.lengths)))
        assert [chunk.tolist() for chunk in got] == want
        # Longer by one token, or three for a chunk that begins within a character.
        assert len(want) > 3 and {LENGTH + 1, LENGTH + 3} <= set(store.lengths.tolist())
        assert manifest(tmp_path / "out", "tokens")["space_before_chunks"] is True
        with pytest.raises(ValueError, match="space_before_chunks True, now it is False"):
            run(source, tokenizer, tmp_path / "out", **options | {"space_before_chunks": False})

    def test_counts(self, made):
        out, line = made
        text, tokens = manifest(out, "text"), manifest(out, "tokens")
        # 90 rows: one is empty; of the others four come a second or third time.
        assert (text["read"], text["duplicates"], text["documents"]) == (90, 4, 85)
        assert text["dropped"] == {"empty text": 1}
        assert text["places"] == {"empty text": ["29.csv:2"]}
        assert text["train"] + text["eval"] == 85
        assert tokens["documents"] == 85 and tokens["sequence_length"] == LENGTH
        assert tokens["tokenizer"] and tokens["add_prefix_space"] is True
        assert tokens["text_sha256"] == text["sha256"] and text["code"].startswith("0.")
        for name in ("text_seconds", "read_seconds"):
            assert text[name] >= 0
        assert "85 documents of 90 records (4 duplicates, 1 x empty text)" in line
        assert len(text["shards"]) > 3 and len(tokens["train"]["shards"]) > 2
        for shard in text["shards"]:
            content = (out / "text" / shard["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert sorted(p.name for p in out.iterdir()) == ["text", "tokens"]

    def test_tfds_reads_it_without_tensorflow(self, made, notes):
        read = tfds.builder_from_directory(made[0] / "text" / "text" / builder.VERSION)
        texts, ids = {}, set()
        for split in ("train", "eval"):
            for example in read.as_data_source(split=split):
                assert set(example) == {"id", "text", "source", "meta"}
                assert example["source"] == b"text" and json.loads(example["meta"]) == {}
                texts[example["text"].decode()] = split
                ids.add(example["id"].decode())
        assert texts == {t: split_of(t, FRACTION) for t in notes[1] if t}
        assert len(ids) == 85 and "00.csv:1" in ids
        assert "tensorflow" not in sys.modules

    def test_features_have_one_order(self, made):
        """Else the bytes of a shard differ from process to process, at random."""
        for path in (made[0] / "text").rglob("*.array_record-*"):
            reader = ArrayRecordReader(str(path))
            for record in reader.read(0, reader.num_records()):
                places = [record.index(f"\n{chr(len(n))}{n}\x12".encode()) for n in FEATURES]
                assert places == sorted(places)
            reader.close()

    def test_no_text_outside_the_shards(self, made, capsys):
        out = made[0]
        assert any(SECRET.encode() in record for record in records(out))
        for path in out.rglob("*.json"):
            assert SECRET not in path.read_text()

    @pytest.mark.parametrize("workers", [1, 3])
    def test_same_bytes_again(self, made, notes, tokenizer, tmp_path, workers):
        if workers > 1:
            (tmp_path / "notes").symlink_to(notes[0])  # another path, other processes
        source = tmp_path / "notes" if workers > 1 else notes[0]
        run(source, tokenizer, tmp_path / "out", workers=workers)
        assert shards(tmp_path / "out") == shards(made[0])
        sums = [
            [manifest(out, "tokens")[split]["sha256"] for split in ("train", "eval")]
            for out in (made[0], tmp_path / "out")
        ]
        assert sums[0] == sums[1]

    def test_second_call_does_nothing(self, made, notes, tokenizer, monkeypatch):
        before = {p: p.stat().st_mtime_ns for p in made[0].rglob("*")}
        monkeypatch.setattr(parallel, "run_all", None)
        assert run(notes[0], tokenizer, made[0]) == made[1]
        assert run("/nowhere", tokenizer, made[0]) == made[1]  # the download may be gone
        assert {p: p.stat().st_mtime_ns for p in made[0].rglob("*")} == before


def records(out):
    for path in (out / "text").rglob("*.array_record-*"):
        for name, text in tokenize.read_shard(path):
            yield name.encode() + text.encode()


class TestRestart:
    @pytest.mark.parametrize("stage", ["read", "write", "tokenize", "gather", "manifest"])
    def test_goes_on_where_it_was_killed(
        self, made, notes, tokenizer, tmp_path, monkeypatch, stage
    ):
        """Ends in the midst of each stage, as a kill does: nothing is tidied up."""
        done = []
        module, name, after = {
            "read": (reading, "_write", 4),
            "write": (builder, "read_records", 9),
            "tokenize": (tokenize, "_batches", 2),
            "gather": (tokenize, "_gather", 1),
            "manifest": (tokenize, "write_manifest", 1),  # the shards are in their place by then
        }[stage]
        whole = getattr(module, name)

        def killed(*args, **kwargs):
            done.append(args)
            if len(done) == after:
                raise KeyboardInterrupt
            return whole(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            # A kill leaves what a clean end would take away.
            patch.setattr(stages.shutil, "rmtree", lambda *a, **k: None)
            with pytest.raises(KeyboardInterrupt):
                run(notes[0], tokenizer, tmp_path / "out")
        assert not (tmp_path / "out" / "tokens").exists()
        assert (tmp_path / "out" / "text" / "manifest.json").exists() == (
            stage in ("tokenize", "gather", "manifest")
        )
        jobs = []
        with monkeypatch.context() as patch:
            for module, name in ((reading, "read_job"), (tokenize, "tokenize_shard")):
                job = getattr(module, name)
                patch.setattr(
                    module, name, lambda *a, job=job, name=name: jobs.append(name) or job(*a)
                )
            run(notes[0], tokenizer, tmp_path / "out")
        assert shards(tmp_path / "out") == shards(made[0])
        reads = len(set(jobs_of(notes[0])))
        shard_count = len(manifest(made[0], "text")["shards"])
        assert jobs.count("read_job") == (reads - 3 if stage == "read" else 0)
        assert jobs.count("tokenize_shard") == {
            "read": shard_count, "write": shard_count, "tokenize": shard_count - 1,
            "gather": 0, "manifest": shard_count,
        }[stage]  # fmt: skip
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["text", "tokens"]

    def test_changed_file_is_read_again(self, notes, tokenizer, tmp_path, monkeypatch):
        source = tmp_path / "notes"
        source.mkdir()
        for path in sorted(notes[0].iterdir())[:6]:
            (source / path.name).write_bytes(path.read_bytes())
        broken = source / "04.csv"
        good = broken.read_bytes()
        broken.write_bytes(good + f'x,"{SECRET} and a quote that stays open'.encode())
        with pytest.raises(ValueError, match="04.csv.*never closed.*are kept") as error:
            run(source, tokenizer, tmp_path / "out")
        assert SECRET not in str(error.value)
        left = list((tmp_path / "out" / "work").rglob("*"))
        assert not [p for p in left if p.suffix == ".tmp"]
        broken.write_bytes(good)
        read = []
        whole = reading.read_job
        monkeypatch.setattr(reading, "read_job", lambda *a: read.append(a[-1].parts) or whole(*a))
        run(source, tokenizer, tmp_path / "out")
        assert broken in read[0] and len(read) == 1

    def test_other_options_are_read_anew(self, notes, tokenizer, tmp_path, monkeypatch):
        """What was read of one column before a kill is not taken for another's."""
        path = tmp_path / "a.csv"
        path.write_text("one,two\n" + "".join(f"first {i},second {i}\n" for i in range(50)))
        with monkeypatch.context() as patch:
            patch.setattr(builder, "plan_shards", None)
            with pytest.raises(TypeError):
                run(path, tokenizer, tmp_path / "out", text_column="one")
        assert list((tmp_path / "out" / "work").glob("job-*"))
        run(path, tokenizer, tmp_path / "out", text_column="two")
        assert all(b"second" in record for record in records(tmp_path / "out"))
        with pytest.raises(ValueError, match="made with options"):
            run(path, tokenizer, tmp_path / "out", text_column="one")

    @pytest.mark.slow
    def test_sigkill(self, made, notes, tokenizer, tmp_path):
        """A process that is killed, at some point of each stage, and started again."""
        out = tmp_path / "out"
        code = (
            "import sys; from train.corpora.build import dataset as builder, reading, dedupe;"
            "reading.JOB_BYTES, builder.SHARD_BYTES, dedupe.AT_ONCE = 5_000, 20_000, 7;"
            "from train import cli; sys.exit(cli.main(sys.argv[1:]))"
        )
        command = [
            sys.executable, "-c", code, "prepare", "--source", str(notes[0]), "--tokenizer",
            tokenizer, "--out", str(out), "--sequence-length", str(LENGTH), "--eval-fraction",
            str(FRACTION), "--workers", "1",
        ]  # fmt: skip
        killed = 0
        for sign in ("work/job-00003", "text/text", "work/tokens/train-00001"):
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while process.poll() is None and not (out / sign).exists():
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += process.returncode == -signal.SIGKILL
            assert not (out / "tokens" / "manifest.json").exists() or process.returncode == 0
        assert killed
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert shards(out) == shards(made[0])


def jobs_of(folder) -> list[str]:
    source = generic("text")
    jobs = reading.plan_jobs(source, folder, source.parts(folder), folder, "")
    return [job.folder.name for job in jobs]


class TestRefusals:
    @pytest.mark.parametrize(
        "changes, problem",
        [
            ({"eval_fraction": 0.2}, "text was made with eval_fraction 0.1, now it is 0.2"),
            ({"sequence_length": 32}, "tokens was made with sequence_length 64, now it is 32"),
            ({"add_prefix_space": False}, "add_prefix_space True, now it is False"),
            ({"corpus": "csv"}, "source text, now it is csv"),
            ({"corpus": "mimic"}, "expected all or one of pubmed, pmc, aci_bench"),
            ({"corpus": "mimic3", "text_column": "text"}, "mimic3 has its own"),
            ({"sequence_length": 2}, "sequence_length: expected at least 3"),
            ({"eval_fraction": 1.0}, "eval_fraction: expected 0 to 1"),
            ({"eval_fraction": -0.1}, "eval_fraction: expected 0 to 1"),
            ({"eval_fraction": float("nan")}, "eval_fraction: expected 0 to 1"),
        ],
    )
    def test_other_options(self, made, notes, tokenizer, changes, problem):
        with pytest.raises(ValueError, match=problem) as error:
            run(notes[0], tokenizer, made[0], **changes)
        assert "\n" not in str(error.value)

    def test_other_input(self, made, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("another text")
        with pytest.raises(ValueError, match="text was made with files"):
            run(tmp_path, tokenizer, made[0])

    def test_missing_credentialed_set(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            run(tmp_path / "none", tokenizer, tmp_path / "out", corpus="mimic3")
        assert "physionet.org" in str(error.value) and "credentialed" in str(error.value)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="NOTEEVENTS.csv.*physionet.org"):
            run(tmp_path / "empty", tokenizer, tmp_path / "out", corpus="mimic3")
        assert not (tmp_path / "out").exists()

    def test_no_text(self, tokenizer, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.csv").write_text("text\n \n")
        with pytest.raises(ValueError, match="expected documents to train on.*empty text"):
            run(tmp_path / "in", tokenizer, tmp_path / "out")

    def test_folder_of_others(self, notes, tokenizer, tmp_path):
        (tmp_path / "work").mkdir()
        with pytest.raises(ValueError, match="expected a new folder"):
            run(notes[0], tokenizer, tmp_path)


class TestGeneric:
    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json"])
    def test_huggingface_reads_local_files(self, kind, tmp_path):
        import datasets

        rows = [{"n": i, "Report": f"text {i}" if i != 2 else ""} for i in range(5)]
        table = datasets.Dataset.from_list(rows)
        path = tmp_path / f"part.{kind}"
        {"csv": table.to_csv, "parquet": table.to_parquet}.get(kind, table.to_json)(path)
        source = find("huggingface", "report" if kind == "csv" else None)
        assert source.parts(tmp_path) == [path] and source.parts(path) == [path]
        report = reading.Report()
        examples = list(source.read(path, tmp_path, report))
        assert [e.text for e in examples] == ["text 0", "text 1", "text 3", "text 4"]
        assert examples[2].id == f"part.{kind}:4"
        assert report.places == {"empty text": [f"part.{kind}:3"]}
        if kind == "json":
            with pytest.raises(ValueError, match="expected a column note; it has 'n', 'Report'"):
                list(find("huggingface", "note").read(path, tmp_path, report))

    def test_huggingface_hub(self, monkeypatch, tokenizer, tmp_path):
        import datasets

        asked = []

        def load(*args, **kwargs):
            asked.append((args, kwargs))
            return iter([{"text": f"note number {i}"} for i in range(100)])

        monkeypatch.setattr(datasets, "load_dataset", load)
        line = run("org/name:small", tokenizer, tmp_path / "out", corpus="huggingface")
        assert asked == [(("org/name", "small"), {"split": "train", "streaming": True})]
        assert "100 documents" in line

        def broken(*args, **kwargs):
            raise OSError(SECRET)

        monkeypatch.setattr(datasets, "load_dataset", broken)
        with pytest.raises(ValueError, match="org/name: `datasets` cannot read it .OSError"):
            run("org/name", tokenizer, tmp_path / "other", corpus="huggingface")

    def test_kinds_of_files(self, tmp_path):
        for name in ("a.txt", "b.csv", "c.tsv", "d.jsonl"):
            content = {"a.txt": "x", "d.jsonl": '{"text": "x"}'}.get(name, "text\nx\n")
            (tmp_path / name).write_text(content)

        def names(kind):
            return [part.name for part in generic(kind).parts(tmp_path)]

        assert names("text") == ["a.txt", "b.csv", "c.tsv", "d.jsonl"]
        assert names("csv") == ["b.csv", "c.tsv"]
        assert names("jsonl") == ["d.jsonl"]
        with pytest.raises(ValueError, match="expected files of .jsonl"):
            generic("jsonl").parts(tmp_path / "b.csv")


class TestBeam:
    def test_data_set_that_a_cluster_made(self, made, notes, tokenizer, tmp_path):
        """build/beam.py leaves a data set and counts; prepare tokenizes them."""
        data_set = tmp_path / "out" / "text" / "text"
        shutil.copytree(made[0] / "text" / "text", data_set)
        counts = {"read": 90, "documents": 85, "dropped: empty text": 1}
        (data_set.parent / "text.counts.json").write_text(json.dumps(counts))
        assert run(notes[0], tokenizer, tmp_path / "out") == made[1].replace(
            str(made[0]), str(tmp_path / "out")
        )
        got, want = (
            {k: v for k, v in shards(out).items() if k.startswith("tokens")}
            for out in (tmp_path / "out", made[0])
        )
        assert got == want
        assert manifest(tmp_path / "out", "text")["duplicates"] == 4
        run(notes[0], tokenizer, tmp_path / "out")  # finds everything done

    def test_a_bucket_needs_a_runner(self, notes, tokenizer):
        with pytest.raises(ValueError, match="expected a local folder, or --beam"):
            run(notes[0], tokenizer, "gs://bucket/out")


def _read_numbered(part, root, report):
    for line in part.read_text().splitlines():
        number, version, text = line.split(",")
        yield Example(f"{number}.{version}", text)


def _scan_numbered(part):
    rows = [line.split(",") for line in part.read_text().splitlines()]
    return records_of((int(n), int(v), False) for n, v, _ in rows)


def _key(example_id):
    number, version = example_id.split(".")
    return int(number), int(version)


def test_only_the_newest_version_is_kept(monkeypatch, tokenizer, tmp_path):
    source = Source(
        "revised", "t", "h", "open", "l", "c", ("*.rec",), _read_numbered,
        revisions=Revisions(lambda part: (part.name,), _scan_numbered, _key),
    )  # fmt: skip
    monkeypatch.setattr(stages, "find", lambda *_: source)
    monkeypatch.setattr(reading, "JOB_BYTES", 1)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1.rec").write_text("1,1,old\n2,1,stays\n")
    (folder / "2.rec").write_text("1,2,new\n3,1,stays too\n")
    line = run(folder, tokenizer, tmp_path / "out", eval_fraction=0.0)
    assert "3 documents of 4 records (0 duplicates, 1 x revised or deleted later)" in line
    texts = {
        text
        for p in (tmp_path / "out").rglob("*-train.array*")
        for _, text in tokenize.read_shard(p)
    }
    assert texts == {"new", "stays", "stays too"}


class TestRealCorpora:
    # name, folder, records, documents: unique texts counted with other tools; see facts/corpora.md
    @pytest.mark.parametrize(
        "name, folder, read, documents, duplicates",
        [
            ("aci_bench", "aci_bench", 87, 87, 0),
            ("negex", "negex", 2376, 2056, 320),
            ("mtsamples", "mtsamples", 297, 281, 12),
            ("medqa", "medqa", 600, 600, 0),
            ("primock57", "primock57", 25, 25, 0),
            ("respiratory_interviews", "simulated_resp_interviews", 90, 90, 0),
        ],
    )
    def test_counts(self, shared, tokenizer, tmp_path, name, folder, read, documents, duplicates):
        run(
            shared / "data" / folder, tokenizer, tmp_path / "out", corpus=name, sequence_length=8192
        )
        facts = manifest(tmp_path / "out", "text")
        got = facts["read"], facts["documents"], facts["duplicates"]
        assert got == (read, documents, duplicates)

    def test_all_and_the_tables(self, shared, tokenizer, tmp_path, capsys):
        root = tmp_path / "in"
        root.mkdir()
        for name in ("negex", "primock57"):
            (root / name).symlink_to(shared / "data" / name)
        (root / "mimic3").mkdir()
        out = tmp_path / "out"
        command = ["prepare", "--corpus", "all", "--source", str(root), "--tokenizer", tokenizer]
        assert cli.main([*command, "--out", str(out), "--workers", "1"]) == 2
        said, error = capsys.readouterr()
        assert "2,056 documents of 2,376 records" in said and "not found in" in said
        assert "error: 1 of 3 corpora failed: mimic3: mimic3: expected" in error
        assert "primock57: expected 57 documents in the complete distribution, found 25" in error
        assert "negex: expected" not in error
        assert "primock57: the evaluation split is empty" in error
        (root / "mimic3").rmdir()
        assert cli.main([*command, "--out", str(out), "--workers", "1"]) == 0
        assert cli.main(["corpora", "--source", str(root), "--out", str(out)]) == 0
        rows = {
            line.split()[0]: line.split()
            for line in capsys.readouterr().out.splitlines()
            if line.split()[0] in ("negex", "primock57", "mimic3")
        }
        assert rows["negex"][3:6] == ["2,056", "100,000", "1"] and rows["negex"][6] == "2,056"
        assert rows["primock57"][-3:-1] == ["25", "25"]
        assert rows["mimic3"][-5:] == ["2,021,411", "1,047,700,000", "missing", "-", "-"]


def test_corpora_lists_all_22():
    names = [source.name for source in sources()]
    assert len(names) == len(set(names)) == 26
    assert names[-4:] == ["text", "jsonl", "csv", "huggingface"]
    kinds = [source.kind for source in sources()]
    assert (kinds.count("biomedical"), kinds.count("clinical")) == (2, 20)
    lines = catalogue().splitlines()
    assert len(lines) == 27 and "2,631,243" in next(r for r in lines if r.startswith("mimic4_note"))


def test_prefix_space_is_the_tokenizers_own(tokenizer):
    """The recipe's tokenizer is the one that transformers' option makes."""
    plain = AutoTokenizer.from_pretrained(tokenizer)
    blank = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=True)
    assert fingerprint(plain) != fingerprint(blank)
    ids = [t.encode("fever", add_special_tokens=False) for t in (plain, blank)]
    assert ids[0] != ids[1] == plain.encode(" fever", add_special_tokens=False)


@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_windows_have_the_ids_of_the_whole_text(tokenizer, add_prefix_space):
    """Against tokenizers alone, with whatever a window could tear apart."""
    plain = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=add_prefix_space)
    plain.add_tokens(["  ", "   "])  # ModernBERT has tokens for runs of spaces
    content = backend_json(plain)
    assert tokenize._can_cut(content)
    backend = tokenizers.Tokenizer.from_str(content)
    draw = random.Random(0)
    pieces = [*"   \n'.,(a", *"  |   |\t | \u00a0|\u3000|Fever|12|39.5|n't|'s".split("|")]
    pieces += [*"e\u0301|\u0301|\u00e9|[MASK]|[SEP]|\U0001f642|\u4e2d\u6587".split("|")]
    for size in (1, 2, 7, 30) * 20:
        text = "".join(draw.choices(pieces, k=120))
        windows = list(tokenize._windows([text], size))
        assert "".join(window for window, _ in windows) == text and len(windows) > 1
        assert [last for _, last in windows] == [False] * (len(windows) - 1) + [True]
        ids = [backend.encode(w, add_special_tokens=False).ids for w, _ in windows]
        assert sum(ids, []) == backend.encode(text, add_special_tokens=False).ids
    # Without such a place, and with tokenizers of which this is not known, a text stays whole.
    assert list(tokenize._windows(["\u4e2d. \u6587" * 9, "b"], 2))[-1] == ("b", True)
    facts = json.loads(content)
    for other in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": None}):
        assert not tokenize._can_cut(json.dumps(facts | other))
    token = facts["added_tokens"][0]
    for other in ({"rstrip": True}, {"content": "two words"}):
        added = [token | other]
        assert not tokenize._can_cut(json.dumps(facts | {"added_tokens": added}))


def test_a_document_in_windows_makes_the_same_bytes(made, notes, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_WINDOW", 10)
    calls = []
    batches = tokenize._batches
    monkeypatch.setattr(
        tokenize, "_batches", lambda texts: (calls.append(b) or b for b in batches(texts))
    )
    run(notes[0], tokenizer, tmp_path / "out")
    assert sum(map(len, calls)) > 10 * len(notes[1])
    assert shards(tmp_path / "out") == shards(made[0])


def test_workers_do_not_wait_for_jax():
    code = "import sys, train.corpora.build.tokenize; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == "False", done.stderr
