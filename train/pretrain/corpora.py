"""The corpora of a run: text goes through `prepare`, token folders are opened."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..common.hosts import log
from ..common.workdir import is_remote
from ..corpora.build.bpe import train_bpe
from ..corpora.build.prepare import prepare, prepare_text, read_texts
from ..corpora.source import files_below
from ..corpora.sources import find
from ..corpora.synthetic import write_corpus
from ..tokens.store import SPLITS, TokenStore, is_store, joined, manifest_of, open_store
from .config import TrainConfig

Corpora = Mapping[str, Mapping[str, TokenStore]]  # {name: {split: its chunks}}


def check_corpora(config: TrainConfig) -> None:
    """Raises FileNotFoundError or ValueError for a corpus that does not exist or cannot be used."""
    unnamed = [phase.name for phase in config.phases if not phase.corpus and not config.corpus]
    if unnamed and not config.synthetic_notes:
        raise ValueError(
            f"corpus: expected one for each phase, got none for {', '.join(unnamed)}; pass "
            "--corpus, or --phases.0.corpus and so on"
        )
    named = [c for p in config.phases for c in p.corpus or config.corpus]
    for corpus in dict.fromkeys([*named, *filter(None, [config.general_text])]):
        if not os.path.exists(corpus):
            raise FileNotFoundError(
                f"corpus {corpus}: expected a folder or file of .txt, .jsonl, .csv, .tsv or "
                ".parquet, a token folder or an MDS folder, found none"
            )
        if is_remote(config.workdir) and not is_store(corpus):
            raise ValueError(
                f"corpus {corpus}: a workdir in a bucket needs a corpus of tokens; run "
                "`python -m train prepare` and pass its folder"
            )


def with_corpora(config: TrainConfig, workdir: Any) -> TrainConfig:
    """Returns the configuration with each phase's corpora; writes synthetic notes if none is given.

    config: one that `check_corpora` accepts.
    """
    default = config.corpus
    if not default and not all(phase.corpus for phase in config.phases):
        folder = pathlib.Path(workdir) / "synthetic"
        if not (folder / ".done").exists():  # hidden, so that it counts as no file that is left out
            log(f"writing {config.synthetic_notes:,} synthetic clinical notes")
            write_corpus(folder, config.synthetic_notes, config.seed)
            (folder / ".done").write_text("")
        default = (str(folder),)
    phases = tuple(dataclasses.replace(p, corpus=p.corpus or default) for p in config.phases)
    return dataclasses.replace(config, phases=phases)


def open_corpora(config: TrainConfig, workdir: Any) -> list[Corpora]:
    """Returns the corpora of each phase, tokenized on the first call.

    Raises ValueError for a phase without an evaluation set.
    """
    config = with_corpora(config, workdir)
    paths = dict.fromkeys(corpus for phase in config.phases for corpus in phase.corpus)
    opened = {path: open_corpus(config, workdir, path) for path in paths}
    out = []
    for phase in config.phases:
        # A corpus listed n times is repeated n times per epoch, with new masks each time.
        corpora = {
            path: opened[path] | {"train": joined([opened[path]["train"]] * count)}
            for path, count in Counter(phase.corpus).items()
        }
        names = [pathlib.PurePath(path).name for path in corpora]
        if len(set(names)) == len(names):
            corpora = dict(zip(names, corpora.values(), strict=True))
        out.append(corpora)
        train, evaluation = (joined([c[split] for c in corpora.values()]) for split in SPLITS)
        if not len(evaluation.lengths):
            raise ValueError(
                f"phase {phase.name}: its corpora have no evaluation split; prepare them with a "
                "larger --eval-fraction"
            )
        budget = f"{config.epochs:g} epochs" if config.epochs else f"{phase.tokens:,} tokens"
        log(
            f"phase {phase.name}: {len(train.lengths):,} chunks, {train.lengths.sum():,} tokens "
            f"for training, {evaluation.lengths.sum():,} for evaluation; budget {budget}"
        )
    return out


def open_corpus(config: TrainConfig, workdir: Any, corpus: str) -> dict[str, TokenStore]:
    """Returns the splits of a corpus; text is tokenized on the first call."""
    if is_store(corpus):
        cache = None if is_remote(workdir) else workdir / "tokens"
        if documents := manifest_of(corpus).get("documents"):
            log(f"{corpus}: {documents:,} documents")
        return open_store(corpus, config.eval_fraction, cache)
    out = _prepared(workdir, corpus)
    summary = prepare(
        source=corpus,
        tokenizer=os.fspath(workdir / "tokenizer"),
        out=os.fspath(out),
        sequence_length=config.sequence_length,
        eval_fraction=config.eval_fraction,
        text_column=config.text_column,
        workers=1,  # new processes would import the calling script again
    )
    log(summary)
    return open_store(out)


def _prepared(workdir: Any, corpus: str) -> pathlib.Path:
    """Returns the output folder of `prepare`; its name changes with the corpus's files."""
    path = pathlib.Path(corpus)
    files = sorted(p for p in files_below(path) if p.is_file()) if path.is_dir() else [path]
    stats = [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return workdir / "tokens" / f"{path.name or 'corpus'}-{digest[:12]}"


def train_tokenizer(config: TrainConfig, workdir: Any) -> Any:
    """Returns a byte-level BPE tokenizer trained on the text of the first phase."""
    log(f"training a byte-level BPE of at most {config.model.vocab_size:,} tokens")
    corpora = [c for c in config.phases[0].corpus if not is_store(c)]
    if not corpora:
        raise ValueError(
            "tokenizer: a corpus of tokens needs the one it was made with; pass --tokenizer"
        )
    source = find("text", config.text_column)
    folders = [_prepared(workdir, corpus) for corpus in corpora]
    for corpus, out in zip(corpora, folders, strict=True):
        prepare_text(source, corpus, out, config.eval_fraction)
    texts = (text for out in folders for text in read_texts(out, "train"))
    return train_bpe(texts, config.model.vocab_size)
