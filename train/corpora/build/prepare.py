"""python -m train prepare: a corpus to text (a TFDS data set), and text to shards of tokens.

    OUT/text/NAME/1.0.0/   the data set: read, deduplicated, split; corpora/builder.py
    OUT/text/manifest.json what was read, dropped and kept; written last
    OUT/tokens/            the token folder, whole when it has manifest.json; tokenise.py
    a folder "work" in OUT what is not finished; gone at the end, and free to delete

A killed run goes on with the same command: what was read and what was tokenised stays. The same
input gives the same bytes in every shard, whatever the number of workers.
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
from typing import Any

import modernbert_jax
from modernbert_jax.tokenizer import AutoTokenizer

from ...tokens.store import SPLITS
from ..source import Source
from ..sources import find, sources
from .reading import files_of
from .tokenize import Recipe, tokenise


def prepare(
    source: str,
    tokenizer: str,
    out: str,
    corpus: str = "text",
    sequence_length: int = 8192,
    eval_fraction: float = 0.005,
    text_column: str = "",
    add_prefix_space: bool = True,
    workers: int = 0,
    beam: tuple[str, ...] = (),
) -> str:
    """A corpus to text and tokens in OUT, which `pretrain --corpus OUT` reads.

    Documents with the same text count once. They are cut at sequence_length - 2 tokens, each piece with
    [CLS] and [SEP]. A second call goes on, or finds all done. Returns a line about it.

    Args:
        source: folder (or file) as it was downloaded; with corpus all, a folder of folders by name.
        tokenizer: folder or hub id.
        out: the folder to make; with corpus all, of a folder for each.
        corpus: a name that `python -m train corpora` lists, or all.
        sequence_length: tokens of the longest piece.
        eval_fraction: held out, by a hash of each document's text.
        text_column: of text, jsonl, csv and huggingface; empty: text, notes, note, ...
        add_prefix_space: a blank before each document, as the reference has it.
        workers: processes; 0: a process for each core.
        beam: options of a Beam pipeline to run in instead, such as runner=DirectRunner.
    """
    options = {
        "sequence_length": sequence_length,
        "eval_fraction": eval_fraction,
        "add_prefix_space": add_prefix_space,
        "workers": workers or len(os.sched_getaffinity(0)),
        "beam": tuple(f"--{option}" for option in beam),
    }
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction: expected 0 to 1, got {eval_fraction}")
    if sequence_length < 3:
        raise ValueError(f"sequence_length: expected at least 3, got {sequence_length}")
    root, folder = pathlib.Path(source), pathlib.Path(out)
    if corpus == "all":
        return _prepare_all(root, tokenizer, folder, options)
    return _prepare_one(find(corpus, text_column), root, tokenizer, folder, **options)


def _prepare_all(
    root: pathlib.Path, tokenizer: str, out: pathlib.Path, options: dict[str, Any]
) -> str:
    known = [source for source in sources() if source.kind != "generic"]
    found = [source for source in known if (root / source.name).is_dir()]
    if not found:
        names = ", ".join(source.name for source in known)
        raise FileNotFoundError(f"{root}: expected folders named as corpora ({names}), found none")
    lines, failed = [], []
    for source in found:
        try:
            lines.append(
                _prepare_one(source, root / source.name, tokenizer, out / source.name, **options)
            )
        except (ValueError, OSError) as error:
            failed.append(f"{source.name}: {error}")
    missing = ", ".join(source.name for source in known if source not in found)
    if missing:
        lines.append(f"not found in {root}: {missing}")
    if failed:
        raise ValueError("\n".join([*lines, f"{len(failed)} corpora failed:", *failed]))
    return "\n".join(lines)


def _prepare_one(
    source: Source,
    root: pathlib.Path,
    tokenizer: str,
    out: pathlib.Path,
    sequence_length: int,
    eval_fraction: float,
    add_prefix_space: bool,
    workers: int,
    beam: tuple[str, ...],
) -> str:
    work = out / "work"
    marks = (
        "work/by-prepare",
        "text/manifest.json",
        f"text/{source.name}.counts.json",
    )  # the last: of Beam
    mine = any((out / name).exists() for name in marks)
    if out.exists() and any(out.iterdir()) and not mine:
        raise ValueError(f"out {out}: expected a new folder, or one made by prepare; name another")
    encoder = AutoTokenizer.from_pretrained(tokenizer, add_prefix_space=add_prefix_space)
    if encoder.cls_token_id is None or encoder.sep_token_id is None:
        raise ValueError(f"tokenizer {tokenizer}: expected [CLS] and [SEP], found a lack of them")
    text = _text_stage(source, root, out, work, eval_fraction, workers, beam)
    facts = {
        # Of the files as they are: a model has the tokenizer with and without the blank.
        "tokenizer": AutoTokenizer.from_pretrained(tokenizer).fingerprint,
        "add_prefix_space": add_prefix_space,
        "sequence_length": sequence_length,
        "text_sha256": text["sha256"],
    }
    tokens = _manifest(out / "tokens")
    if tokens:
        _same(out / "tokens", tokens, facts)
    else:
        ends = encoder.cls_token_id, encoder.sep_token_id
        recipe = Recipe(encoder.backend_tokenizer.to_str(), len(encoder), ends, sequence_length)
        shards: dict[str, list[tuple[pathlib.Path, str]]] = {split: [] for split in SPLITS}
        for shard in text["shards"]:
            shards[shard["split"]].append((out / "text" / shard["name"], shard["sha256"]))
        more = facts | {k: v for k, v in text.items() if k not in ("shards", *SPLITS, "sha256")}
        tokens = tokenise(
            shards, recipe, work / "tokens", out / "tokens", facts["tokenizer"], more, workers, beam
        )
    shutil.rmtree(work, ignore_errors=True)
    _compare(source, text["documents"], sum(tokens[split]["tokens"] for split in SPLITS))
    if not text["eval"]:
        _warn(
            f"{source.name}: no document is held out; raise --eval-fraction for scores of its own"
        )
    parts = ", ".join(
        f"{tokens[split]['tokens']:,} tokens in {tokens[split]['pieces']:,} pieces ({split})"
        for split in SPLITS
    )
    dropped = "".join(f", {count:,} x {why}" for why, count in text["dropped"].items())
    return (
        f"{out}: {text['documents']:,} documents of {text['read']:,} records "
        f"({text['duplicates']:,} duplicates{dropped}), {parts}"
    )


def _text_stage(
    source: Source,
    root: pathlib.Path,
    out: pathlib.Path,
    work: pathlib.Path,
    eval_fraction: float,
    workers: int,
    beam: tuple[str, ...],
) -> dict[str, Any]:
    """Makes OUT/text, unless it is there; returns its manifest."""
    from .dataset import VERSION, build, read_options

    facts = {"source": source.name, "eval_fraction": eval_fraction, "version": VERSION}
    facts["options"] = read_options(source)
    text = out / "text"
    manifest = _manifest(text)
    if manifest:
        if root.exists():
            facts["files"] = files_of(source.parts(root), root)
        _same(text, manifest, facts)
        return manifest
    if (text / f"{source.name}.counts.json").is_file():
        folder = text / source.name / VERSION
        return _write_manifest(text, folder, source, facts, _counts_of_beam(text, folder, source))
    if not root.exists() and source.name != "huggingface":
        raise FileNotFoundError(
            f"source {root}: no such folder; {source.title} is to be had at {source.homepage}, "
            f"access {source.access}" + f" ({source.agreement})" * bool(source.agreement)
        )
    source.parts(root)  # says what is missing, before anything is made
    shutil.rmtree(text, ignore_errors=True)  # without a manifest it is not whole
    work.mkdir(parents=True, exist_ok=True)
    (work / "by-prepare").write_text("")  # so that a folder of others is never taken for ours
    for left in work.rglob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    start = time.perf_counter()
    # TFDS prints on stdout what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        folder, counts = build(source, root, text, work, eval_fraction, workers, beam)
    counts["text_seconds"] = round(time.perf_counter() - start, 2)
    manifest = _write_manifest(text, folder, source, facts, counts)
    for job in work.glob("job-*"):
        shutil.rmtree(job, ignore_errors=True)
    return manifest


def _write_manifest(
    text: pathlib.Path,
    folder: pathlib.Path,
    source: Source,
    facts: dict[str, Any],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Makes OUT/text whole. folder: of the TFDS data set in it."""
    shards = [
        {"name": str(path.relative_to(text)), "split": split, "bytes": path.stat().st_size}
        | {"sha256": _sha256(path)}
        for split in SPLITS
        for path in sorted(folder.glob(f"*-{split}.array_record-*"))
    ]
    total = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    about = {"title": source.title, "kind": source.kind, "licence": source.licence}
    manifest = facts | about | counts
    manifest |= {"code": _code_version(), "sha256": total, "shards": shards}
    temporary = text / "manifest.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    temporary.replace(text / "manifest.json")
    return manifest


def _counts_of_beam(text: pathlib.Path, folder: pathlib.Path, source: Source) -> dict[str, Any]:
    """Counts of a data set that corpora/beam.py made, as the builder gives them."""
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


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _same(folder: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name} {found.get(name)}, now it is {value}; delete the "
                "folder to make it again, or name another --out"
            )


def _compare(source: Source, documents: int, tokens: int) -> None:
    """One line where a corpus is not what the whole distribution should give."""
    if source.documents and documents != source.documents:
        _warn(
            f"{source.name}: expected {source.documents:,} documents of the whole distribution, "
            f"found {documents:,}"
        )
    elif source.tokens and not 0.5 < tokens / source.tokens < 2:  # the card has one digit of some
        _warn(f"{source.name}: expected about {source.tokens:,} tokens, found {tokens:,}")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_version() -> str:
    """The version, and the commit where this is a checkout."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return modernbert_jax.__version__
    return f"{modernbert_jax.__version__} {commit}"
