"""Checks a tokenizer's files before the tokenizers library, written in Rust, reads them.

A file can make that library abort the process (an allocation of any size), or raise a panic that
`except Exception` does not catch, when it is loaded or at the first text. So its components are
those that are known to be safe within the bounds below.
"""

import base64
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from modernbert_jax.untrusted import read_json, shown

TOKENIZER_FILE = "tokenizer.json"
FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# The components that tokenizers of BERT, RoBERTa, T5, Llama and sentence-transformers are made of.
KINDS = {
    "normalizer": """BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend
    Replace Sequence Strip StripAccents""".split(),
    "pre_tokenizer": """BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation
    Sequence Split UnicodeScripts Whitespace WhitespaceSplit""".split(),
    "post_processor": """BertProcessing ByteLevel RobertaProcessing Sequence
    TemplateProcessing""".split(),
    "decoder": """BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Sequence Strip
    WordPiece""".split(),
    "model": ["BPE", "Unigram", "WordLevel", "WordPiece"],
}
MAX_PARTS = 64  # components of one kind, and entries of a template
MAX_PATTERN = 1024  # characters of a regular expression
MAX_GROWTH = 256  # how many times longer the replacements may make a text
MAX_ADDED = 2**20  # characters of all added tokens
MAX_LENGTH = 2**20  # of padding, truncation and words
_NESTED = re.compile(r"\([^()]*[^\\(][+*}][^()]*\)[+*{]")  # such as (a+)+


def check_files(folder: pathlib.Path) -> None:
    """Raises ValueError, with the path, if a tokenizer's file in `folder` is unsafe or damaged."""
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        data = read_json(path)
        try:
            if name == TOKENIZER_FILE:
                _check_backend(data)
            elif name != "added_tokens.json":  # {token: id}, which transformers checks
                _check_settings(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_settings(data: dict[str, Any]) -> None:
    """Checks the special tokens and the longest text in a file of transformers."""
    for name, value in data.items():
        if name.endswith("_token") and not name.startswith(("add_", "use_")):
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str) and value is not None:
                raise ValueError(f"{name}: expected a token's text, got {shown(value)}")
    longest = data.get("model_max_length")
    if longest is not None and (type(longest) not in (int, float) or not longest >= 1):
        raise ValueError(
            f"model_max_length: expected a number from 1 on, or null, got {shown(longest)}"
        )


def _check_backend(data: dict[str, Any]) -> None:
    for kind, known in KINDS.items():
        parts = list(_parts(kind, data.get(kind)))
        if len(parts) > MAX_PARTS:
            raise ValueError(f"{kind}: expected at most {MAX_PARTS} components, got {len(parts)}")
        growth = 1
        for part in parts:
            name = part.get("type", "" if kind == "model" else None)  # old files have no type here
            if name != "" and name not in known:
                raise ValueError(f"{kind}: expected one of {', '.join(known)}, got {shown(name)}")
            growth *= _check_part(kind, part)
            if growth > MAX_GROWTH:
                raise ValueError(
                    f"{kind}: expected replacements that make a text at most {MAX_GROWTH} times "
                    "longer, got more"
                )
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"added_tokens: expected a list of objects, got {shown(added)}")
    size = sum(len(str(token.get("content"))) for token in added)
    if size > MAX_ADDED:
        raise ValueError(f"added_tokens: expected at most {MAX_ADDED:,} characters, got {size:,}")
    for name in ("padding", "truncation"):
        _bound(name, data.get(name), MAX_LENGTH)


def _parts(kind: str, value: Any) -> Iterator[dict[str, Any]]:
    """Yields the components of a kind; those of a Sequence one by one."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{kind}: expected an object or null, got {shown(value)}")
    yield value
    if value.get("type") == "Sequence":
        # The name of the list is normalizers, pretokenizers, processors or decoders.
        for inner in value.values():
            for part in inner if isinstance(inner, list) else ():
                yield from _parts(kind, part)


def _check_part(kind: str, part: dict[str, Any]) -> int:
    """Checks one component. Returns how many times longer it may make a text."""
    name = part.get("type")
    pattern, growth = part.get("pattern"), 1
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex is not None:
        if not isinstance(regex, str) or len(regex) > MAX_PATTERN or _NESTED.search(regex):
            raise ValueError(
                f"{kind}: expected a pattern of at most {MAX_PATTERN:,} characters without nested "
                f"repetitions, got {shown(regex)}"
            )
    if name == "Replace":
        plain: Any = pattern.get("String") if isinstance(pattern, dict) else pattern
        content: Any = part.get("content")
        if not isinstance(content, str) or not isinstance(regex or plain, str):
            raise ValueError(f"{kind}: expected a Replace of a pattern by text")
        # A regular expression may also match between two characters.
        growth = 1 + len(content) if regex else -(-len(content) // max(1, len(plain)))
    if name == "Precompiled":
        growth = _check_charsmap(kind, part.get("precompiled_charsmap"))
    if kind == "model":
        _bound(kind, {k: v for k, v in part.items() if k != "vocab"}, MAX_LENGTH)
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if len(str(part.get(affix))) > MAX_PARTS:
                raise ValueError(f"{kind}: {affix}: expected a few characters, got more")
    if name == "TemplateProcessing":
        for template in (part.get("single"), part.get("pair")):
            if isinstance(template, list) and len(template) > MAX_PARTS:
                raise ValueError(
                    f"{kind}: expected a template of at most {MAX_PARTS} entries, "
                    f"got {len(template)}"
                )
    return max(1, growth)


def _bound(where: str, value: Any, most: int) -> None:
    """Raises ValueError for a size above `most` in an object."""
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        raise ValueError(f"{where}: expected sizes of at most {most:,}, got {shown(value)}")
    if isinstance(value, dict):
        for inner in value.values():
            _bound(where, inner, most)


def _check_charsmap(where: str, text: Any) -> int:
    """Checks the compiled rules of sentencepiece: a double-array trie, then the replacements.

    Walks the trie as the library does, which trusts every index in it. Returns the length of the
    longest replacement in characters. Source: sentencepiece (normalizer.cc) and darts-clone.
    """
    damaged = ValueError(f"{where}: expected a complete precompiled_charsmap, got a damaged one")
    try:
        content = base64.b64decode(text, validate=True)
        size = int.from_bytes(content[:4], "little")
        if len(content) < 4 or size % 4 or not 4 <= size <= len(content) - 4:
            raise damaged
        units = np.frombuffer(content[4 : 4 + size], "<u4").astype(np.int64)
        rest = content[4 + size :]
        growth = max(map(len, rest.decode("utf-8").split("\0")))
    except (TypeError, ValueError):
        raise damaged from None
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    labels, has_leaf = units & ((1 << 31) | 0xFF), (units >> 8) & 1 == 1
    letters = np.arange(1, 256)
    nodes, seen = offsets[:1], np.zeros(len(units), bool)
    while len(nodes):
        children = (nodes[:, None] ^ letters).ravel()
        if children.max() >= len(units):
            raise damaged
        match = labels[children] == np.broadcast_to(letters, (len(nodes), 255)).ravel()
        children = np.unique(children[match & ~seen[children]])
        seen[children] = True
        nodes = children ^ offsets[children]
        leaves = nodes[has_leaf[children]]
        if len(leaves) and leaves.max() >= len(units):
            raise damaged
        starts = units[leaves] & ((1 << 31) - 1)
        # A replacement starts at a character, not within one.
        if any(s > len(rest) or rest[s : s + 1] >= b"\x80" and rest[s] < 0xC0 for s in starts):
            raise damaged
    return growth
