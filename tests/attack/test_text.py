"""Corpora and task files with random damage: one line that shows no text, or they are read."""

import json
import random
import re
import traceback

import pytest

from tests.xml_files import article, jats
from train.corpora.source import Report
from train.corpora.sources import find
from train.finetune.tasks import task_named
from train.finetune.tasks.task import with_shown_labels

MARK = b"Zzyqname Qvornak"
QUESTIONS = [{"question": "who?", "answers": [{"text": "nurse", "answer_start": 4}] * 2}] * 9
SQUAD = {"data": [{"paragraphs": [{"context": "The nurse said so.", "qas": QUESTIONS}]}]}
RECORD = b"START_OF_RECORD=1||||1||||Seen %s on %s ok||||END_OF_RECORD\n"
NEGEX = b"1\tfever\tNo fever today.\tNegated\tRecent\tPatient\n"
# (corpus, tasks, files): sound ones, which are damaged.
SOUND = [
    ("csv", ["classification"], {"x.csv": b'text,label\n"a, b",x\nc,y\n' + b"d,x\ne,y\n" * 9}),
    ("csv", ["multilabel"], {"x.tsv": b"text\tlabels\n" + b"a\tx|y\nb\ty\n" * 9}),
    ("jsonl", ["classification"], {"x.jsonl": b'{"text": "a", "label": "x"}\n{"text": "b"}\n' * 9}),
    ("text", ["tokens"], {"x.txt": b"The O\nnurse B-who\n\nno O\n\n" * 9}),
    ("jsonl", ["tokens"], {"x.jsonl": b'{"words": ["a", "b"], "labels": ["O", "B-x"]}\n' * 9}),
    ("medqa", [], {"US/test.jsonl": b'{"question": "a", "options": {"A": "b", "B": "c"}}\n' * 9}),
    ("primock57", [], {"notes/day1_consultation01.json": b'{"day": 1, "note": "a b c"}'}),
    ("negex", ["negex"], {"rsAnnotations-1-120-random.txt": NEGEX * 9}),
    ("text", ["qa"], {"x.json": json.dumps(SQUAD).encode()}),
    ("text", ["deid"], {"id.text": RECORD % (b"Li", b"3/4") * 9,
                        "id.res": RECORD % (b"[**name**]", b"[**3**]") * 9}),
    ("text", ["cos", "social_history"], {
        f"{i}.{suffix}": content for i in range(9) for suffix, content in (
            ("txt", b"The lung is clear. "), ("ann", b"T1\tSnippet 0 18\tThe lung is clear.\n"
                                              b"T2\tVal 4 8\tlung\n"))}),
    ("pubmed", [], {"pubmed26n0001.xml": f"<PubmedArticleSet>{article(7)}{article(8)}"
                    "</PubmedArticleSet>".encode()}),
    ("pmc", [], {"PMC12.xml": jats(), "PMC13.xml": jats("13")}),
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with random cuts, and then random changes that bring the name into it.

    One word of the name alone may be the name of a column, which errors show.
    """
    for _ in range(rng.choice((0, 0, 1, 2))):
        at = rng.randrange(len(content) + 1)
        content = rng.choice((content[:at], content[:at] + content[at + rng.randrange(40) :]))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        extra = rng.choice((b'"', b",", b"\n", b"\t", b"<", b"&", b"{", b"[", b"\0", b"\xff", b"|"))
        words = sorted(set(re.findall(rb"\w+", content))) or [MARK]
        content = rng.choice((
            content[:at] + MARK + content[at:],
            content[:at] + MARK + extra + MARK + content[at:],
            MARK + b"\n" + content,
            content.replace(rng.choice(words), MARK, rng.choice((1, -1))),
            re.sub(rb"\d+", MARK, content, count=rng.choice((1, 3, 0))),
            re.sub(rb'(?<=: )"', rng.choice((b"[", b'{"Zzyq name":', b"3")), content, count=1),
        ))  # fmt: skip
    return content


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]
)
def test_damaged_files_show_no_text(seed, tmp_path, capfd):
    rng = random.Random(seed)
    said = []

    def tried(action) -> None:
        try:
            action()
        except (ValueError, OSError) as error:
            said.append("".join(traceback.format_exception(error)))

    for trial in range(10):
        for number, (corpus, tasks, files) in enumerate(SOUND):
            root = tmp_path / f"{trial}-{number}"
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(damaged(content, rng))
            source, report = find(corpus), Report()

            def read(root=root, source=source, report=report) -> None:
                for part in source.parts(root):
                    if source.revisions:
                        source.revisions.scan(part)
                    said.extend(example.id for example in source.read(part, root, report))

            tried(read)
            said.append(f"{report.dropped} {report.places}")
            path = root if len(files) > 1 or "negex" in tasks else root / next(iter(files))
            for name in tasks:

                def load(name=name, path=path) -> None:
                    data = with_shown_labels(task_named(name).load(path), str(path))
                    said.append(f"{data.skipped} {data.kept}")

                tried(load)
    text = "".join([*said, *capfd.readouterr()]).lower()
    assert "zzyq" not in text and "qvornak" not in text
    assert text.count("error: ") > 50 and len(said) > 200
