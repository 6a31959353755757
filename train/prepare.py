"""python -m train prepare: text to shards of tokens, once, for any number of runs and hosts."""

import json
import pathlib

from modernbert_jax.tokenizer import AutoTokenizer

from .config import TrainConfig
from .tokens import SPLITS, prepare_tokens


def prepare(
    source: str,
    tokenizer: str,
    out: str,
    row_length: int = 8192,
    eval_fraction: float = 0.005,
    text_column: str = "",
) -> str:
    """Text to shards of tokens in OUT, which `pretrain --corpus OUT` reads.

    Documents are cut at row_length - 2 tokens, each piece with [CLS] and [SEP]. OUT is whole when
    it holds manifest.json; a second call then does nothing. Returns a line about it.

    Args:
        source: folder or file of .txt, .jsonl, .csv or .tsv.
        tokenizer: folder or hub id.
        out: the folder to make.
        row_length: tokens of the longest piece.
        eval_fraction: held out, by a hash of each document's text.
        text_column: of .jsonl, .csv and .tsv; empty: text, notes, note, ...
    """
    folder = pathlib.Path(out)
    whole = (folder / "manifest.json").exists()
    if folder.exists() and not whole and any(folder.iterdir()):
        raise ValueError(f"out {out}: expected a new folder, or one made by prepare; name another")
    config = TrainConfig(
        row_length=row_length, eval_fraction=eval_fraction, text_column=text_column
    )
    prepare_tokens(source, AutoTokenizer.from_pretrained(tokenizer), config, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = ", ".join(
        f"{manifest[split]['tokens']:,} tokens in {manifest[split]['pieces']:,} pieces ({split})"
        for split in SPLITS
    )
    return f"{folder}: {manifest['documents']:,} documents, {parts}"
