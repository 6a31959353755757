"""python -m train prepare: turns a corpus into text (a TFDS data set) and text into token shards.

    OUT/text/NAME/1.0.1/    the data set: read, deduplicated, split; see build/dataset.py
    OUT/text/manifest.json  what was read, dropped and kept; written last
    OUT/tokens/             the token folder, complete once it has manifest.json
    OUT, folder "work"      unfinished work; removed at the end and safe to delete

The same command resumes a killed run: files that were read and shards that were tokenized are kept.
The same input gives the same bytes in every shard, for any number of workers.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import modernbert_jax
from modernbert_jax.tokenizer import AutoTokenizer, backend_json, fingerprint, vocab_size

from ...common.records import read_object
from ...tokens.store import SPLITS
from ..source import Source
from ..sources import find, sources
from .reading import files_of, times_of
from .tokenize import Recipe, read_shard, tokenize


def prepare(
    source: str,
    tokenizer: str,
    out: str,
    corpus: str = "text",
    sequence_length: int = 8192,
    eval_fraction: float = 0.005,
    text_column: str | None = None,
    add_prefix_space: bool = True,
    space_before_chunks: bool = False,
    workers: int = 0,
    beam: tuple[str, ...] = (),
) -> str:
    """Turns a corpus into text and tokens in OUT, which `pretrain --corpus OUT` reads.

    Documents with equal text are kept once and cut into chunks of at most sequence_length tokens,
    each with [CLS] and [SEP]. A literal "[SEP]" or "[MASK]" in a document is text. A second call
    resumes, or finds everything done. Returns a summary.

    Args:
        source: folder (or file) as downloaded; with corpus all, a folder of folders by name.
        tokenizer: folder or hub id.
        out: output folder; with corpus all, it gets a folder for each corpus.
        corpus: a name that `python -m train corpora` lists, or all.
        sequence_length: maximum tokens in a chunk, [CLS] and [SEP] included.
        eval_fraction: share of documents in the evaluation split, chosen by a hash of their text.
        text_column: text column for text, jsonl, csv, huggingface; None: text, notes, note, ...
        add_prefix_space: put a space before each document, as the reference does.
        space_before_chunks: encode the first token of each chunk again as a space and its text, as
            the reference's script convert_dataset_to_mds does; a chunk may then be a few tokens
            longer than sequence_length, and training cuts it.
        workers: number of processes; 0 starts one for each core.
        beam: options of an Apache Beam pipeline that builds the text instead, such as
            runner=DataflowRunner; SOURCE and OUT may then be buckets, and a bucket gets text only.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 to 1, got {eval_fraction}")
    if sequence_length < 3:
        raise ValueError(f"sequence_length: expected at least 3, got {sequence_length}")
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "sequence_length": sequence_length,
        "eval_fraction": eval_fraction,
        "add_prefix_space": add_prefix_space,
        "space_before_chunks": space_before_chunks,
        "workers": workers or len(os.sched_getaffinity(0)),
        "beam": tuple(f"--{option}" for option in beam),
    }
    if corpus == "all":
        return _prepare_all(source, out, options)
    return _prepare_one(find(corpus, text_column), source, out, **options)


def _prepare_all(root: str, out: str, options: dict[str, Any]) -> str:
    known = [source for source in sources() if source.kind != "generic"]
    found = [source for source in known if os.path.isdir(os.path.join(root, source.name))]
    if not found:
        names = ", ".join(source.name for source in known)
        raise FileNotFoundError(f"{root}: expected folders named as corpora ({names}), found none")
    lines, failed = [], []
    for source in found:
        inside, made = os.path.join(root, source.name), os.path.join(out, source.name)
        try:
            lines.append(_prepare_one(source, inside, made, **options))
        except (ValueError, OSError) as error:
            failed.append(f"{source.name}: {error}")
    missing = ", ".join(source.name for source in known if source not in found)
    if missing:
        lines.append(f"not found in {root}: {missing}")
    if failed:
        print("\n".join(lines))  # an error has one line
        raise ValueError(f"{len(failed)} of {len(found)} corpora failed: {'; '.join(failed)}")
    return "\n".join(lines)


def _prepare_one(
    source: Source,
    root: str,
    out: str,
    tokenizer: str,
    sequence_length: int,
    eval_fraction: float,
    add_prefix_space: bool,
    space_before_chunks: bool,
    workers: int,
    beam: tuple[str, ...],
) -> str:
    if "://" in out:
        return _text_in_bucket(source, root, out, eval_fraction, beam)
    folder = pathlib.Path(out)
    _refuse_foreign(folder, source)
    encoder = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=add_prefix_space)
    if encoder.cls_token_id is None or encoder.sep_token_id is None:
        raise ValueError(f"tokenizer {tokenizer}: expected [CLS] and [SEP], found no such tokens")
    text = prepare_text(source, root, folder, eval_fraction, workers, beam)
    facts = {
        # Fingerprint of the files: a model comes with one tokenizer, with and without the space.
        "tokenizer": fingerprint(AutoTokenizer.from_pretrained(tokenizer)),
        "add_prefix_space": add_prefix_space,
        "split_special_tokens": True,
        "space_before_chunks": space_before_chunks,
        "sequence_length": sequence_length,
        "text_sha256": text["sha256"],
    }
    tokens = read_object(folder / "tokens" / "manifest.json")
    if tokens:
        _same(folder / "tokens", tokens, facts)
    else:
        ends: Any = encoder.cls_token_id, encoder.sep_token_id
        size = vocab_size(encoder)
        recipe = Recipe(backend_json(encoder), size, ends, sequence_length, space_before_chunks)
        shards: dict[str, list[tuple[pathlib.Path, str]]] = {split: [] for split in SPLITS}
        for shard in text["shards"]:
            shards[shard["split"]].append((folder / "text" / shard["name"], shard["sha256"]))
        more = facts | {k: v for k, v in text.items() if k not in ("shards", *SPLITS, "sha256")}
        work = folder / "work" / "tokens"
        tokens = tokenize(
            shards, recipe, work, folder / "tokens", facts["tokenizer"], more, workers
        )
    shutil.rmtree(folder / "work", ignore_errors=True)
    _compare(source, text["documents"], sum(tokens[split]["tokens"] for split in SPLITS))
    if not text["eval"]:
        _warn(
            f"{source.name}: the evaluation split is empty; raise --eval-fraction to evaluate on it"
        )
    parts = ", ".join(
        f"{tokens[split]['tokens']:,} tokens in {tokens[split]['chunks']:,} chunks ({split})"
        for split in SPLITS
    )
    dropped = "".join(f", {count:,} x {why}" for why, count in text["dropped"].items())
    return (
        f"{folder}: {text['documents']:,} documents of {text['read']:,} records "
        f"({text['duplicates']:,} duplicates{dropped}), {parts}"
    )


def _text_in_bucket(
    source: Source, root: str, out: str, eval_fraction: float, beam: tuple[str, ...]
) -> str:
    if not beam:
        raise ValueError(f"out {out}: expected a local folder, or --beam with a runner")
    from .beam import build

    folder, counts = build(source, root, f"{out.rstrip('/')}/text", beam, eval_fraction)
    return (
        f"{folder}: {counts['documents']:,} documents of {counts['read']:,} records; copy {out} "
        "to a local folder and run the same command with it as --out to tokenize them"
    )


def _refuse_foreign(out: pathlib.Path, source: Source) -> None:
    marks = ("work/by-prepare", "text/manifest.json", f"text/{source.name}.counts.json")
    if out.exists() and any(out.iterdir()) and not any((out / mark).exists() for mark in marks):
        raise ValueError(f"out {out}: expected a new folder, or one made by prepare; name another")


def prepare_text(
    source: Source,
    root: str | os.PathLike[str],
    out: pathlib.Path,
    eval_fraction: float,
    workers: int = 1,
    beam: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Builds OUT/text unless it is complete; returns its manifest.

    Raises ValueError or FileNotFoundError with one line for an OUT that holds something else, for
    text that was made with other options, and for files that cannot be read.
    """
    from .dataset import VERSION, build, read_options

    _refuse_foreign(out, source)
    text, work, local = out / "text", out / "work", pathlib.Path(root)
    facts = {"source": source.name, "eval_fraction": eval_fraction, "version": VERSION}
    facts["options"] = read_options(source)
    manifest = read_object(text / "manifest.json")
    times = {}
    if local.exists():  # a download may be deleted once its text is made
        files = source.files_read(local)
        times = {"times": times_of(files, local)}
        if manifest.get("times") != times["times"]:  # copied, or edited
            facts["files"] = files_of(files, local)
    if manifest:
        _same(text, manifest, facts)
        return manifest
    facts |= times
    if not (text / f"{source.name}.counts.json").is_file():
        if beam:
            from .beam import build as build_by_beam

            build_by_beam(source, os.fspath(root), os.fspath(text), beam, eval_fraction)
        elif not local.exists() and source.name != "huggingface":
            raise FileNotFoundError(f"source {root}: no such folder; {source.availability}")
    if (text / f"{source.name}.counts.json").is_file():
        folder = text / source.name / VERSION
        return _write_manifest(text, folder, source, facts, _counts_of_beam(text, folder, source))
    shutil.rmtree(text, ignore_errors=True)  # it has no manifest, so it is incomplete
    work.mkdir(parents=True, exist_ok=True)
    (work / "by-prepare").write_text("")  # marks OUT as ours from the start
    for left in work.rglob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    if local.exists() and (remark := source.remark(local)):
        _warn(remark)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its progress
        folder, counts = build(source, local, text, work, eval_fraction, workers)
    counts["text_seconds"] = round(time.perf_counter() - start, 2)
    manifest = _write_manifest(text, folder, source, facts, counts)
    for job in work.glob("job-*"):
        shutil.rmtree(job, ignore_errors=True)
    return manifest


def read_texts(out: pathlib.Path, split: str) -> Iterator[str]:
    """The documents of a split of OUT/text, in order."""
    for shard in read_object(out / "text" / "manifest.json", "shards")["shards"]:
        if shard["split"] == split:
            for _, text in read_shard(out / "text" / shard["name"]):
                yield text


def _write_manifest(
    text: pathlib.Path,
    folder: pathlib.Path,
    source: Source,
    facts: dict[str, Any],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Completes OUT/text. folder: the TFDS data set in it."""
    shards = [
        {"name": str(path.relative_to(text)), "split": split, "bytes": path.stat().st_size}
        | {"sha256": _sha256(path)}
        for split in SPLITS
        for path in sorted(folder.glob(f"*-{split}.array_record-*"))
    ]
    total = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    about = {"title": source.title, "kind": source.kind, "license": source.license}
    manifest = facts | about | counts
    manifest |= {"code": _code_version(), "sha256": total, "shards": shards}
    temporary = text / "manifest.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.replace(text / "manifest.json")
    return manifest


def _counts_of_beam(text: pathlib.Path, folder: pathlib.Path, source: Source) -> dict[str, Any]:
    """The counts that build/beam.py left, in the form of CorpusBuilder.counts."""
    counts = json.loads((text / f"{source.name}.counts.json").read_text())
    dropped = {
        name.removeprefix("dropped: "): count
        for name, count in counts.items()
        if name.startswith("dropped: ")
    }
    splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
    lengths = {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    duplicates = counts["read"] - sum(dropped.values()) - counts["documents"]
    return {
        "read": counts["read"],
        "dropped": dropped,
        "duplicates": duplicates,
        "documents": counts["documents"],
        **{split: lengths.get(split, 0) for split in SPLITS},
    }


def _same(folder: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name} {found.get(name)}, now it is {value}; delete the "
                "folder to make it again, or name another --out"
            )


def _compare(source: Source, documents: int, tokens: int) -> None:
    """Warns if the corpus differs from the size of the complete distribution."""
    if source.documents and documents != source.documents:
        _warn(
            f"{source.name}: expected {source.documents:,} documents in the complete distribution, "
            f"found {documents:,}"
        )
    elif source.tokens and not 0.5 < tokens / source.tokens < 2:  # the card rounds to one digit
        _warn(f"{source.name}: expected about {source.tokens:,} tokens, found {tokens:,}")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_version() -> str:
    """The version, and the commit in a checkout."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return modernbert_jax.__version__
    return f"{modernbert_jax.__version__} {commit}"
