"""PubMed: titles and abstracts of the baseline and the update files of one year.

Layout: baseline/pubmed26n0001.xml.gz to pubmed26n1334.xml.gz, updatefiles/ from 1335 on, each with
a .md5 file that is checked. The numbers are in order of time. A later file repeats revised records
in full, and <DeleteCitation> lists deleted ones. A record may have several versions (PMID Version);
the newest that is not deleted is used.

A document is a record's title, an empty line, and its abstract: a line for each AbstractText, with
its label ("METHODS: ..."). Markup is removed, the text inside it kept, except annotations of
formulas. The brackets around a translated title are removed; "[Not Available]." is no title.
Without an Abstract, the first English OtherAbstract is used, where older records have their only
one. Copyright lines, keywords, MeSH, authors and grants are left out. Records without an abstract
and records of books are dropped and counted.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)

from ..readers.markup import DAMAGE, check_md5, damaged, has_entity, open_stream, records, text_of
from ..source import Example, Report, Revisions, Source, name_of, records_of

_NAME = re.compile(r"pubmed(\d\d)n(\d{4,})")
_TRANSLATED = re.compile(r"\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]\.?")
_NO_TITLES = {"not available", "in process citation"}  # what NLM puts in the brackets until then
_PMID = re.compile("[1-9][0-9]{0,7}")
_VERSION = re.compile("[1-9][0-9]{0,3}")
_CHUNK = 1 << 20
# What the scan looks for. NLM writes the PMID of a record first in its citation.
_TOKEN = re.compile(
    rb"<(MedlineCitation|/?DeleteCitation)[\s>]|<PMID(?:\s+Version=[\"'](\d+)[\"'])?\s*>\s*(\d+)\s*<"
)
_LONGEST_TOKEN = 200  # bytes


def age(part: pathlib.Path) -> tuple[int, int]:
    """The sort key of a file: (year, number). Others come first."""
    found = _NAME.search(part.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def key(example_id: str) -> tuple[int, int]:
    """(PMID, version) of an id."""
    pmid, version = example_id.split(".")
    return int(pmid), int(version)


def scan(part: pathlib.Path) -> np.ndarray:
    """Finds PMIDs and versions of a file's records and deletions, without parsing it."""
    check_md5(part)
    return records_of(_scan(part))


def _scan(part: pathlib.Path) -> Iterator[tuple[int, int, bool]]:
    where, rest = b"", b""
    try:
        with open_stream(part) as stream:
            while chunk := stream.read(_CHUNK):
                rest += chunk
                end = 0
                for found in _TOKEN.finditer(rest):
                    end = found.end()
                    if found[1]:
                        where = found[1]
                    elif where in (b"MedlineCitation", b"DeleteCitation"):
                        deleted = where == b"DeleteCitation"
                        if len(found[3]) <= 8 and len(found[2] or b"") <= 4:
                            yield int(found[3]), int(found[2] or 1), deleted
                        # Further PMIDs in a citation belong to comments and corrections.
                        where = where if deleted else b""
                rest = rest[max(end, len(rest) - _LONGEST_TOKEN) :]
    except DAMAGE:
        raise damaged(part) from None


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the documents of a file, all versions. Raises ValueError if it is incomplete."""
    check_md5(part)
    seen: set[str] = set()  # a file has 30,000 records
    tags = ("PubmedArticle", "PubmedBookArticle")
    for number, article in enumerate(records(part, tags), start=1):
        place = f"{name_of(part.relative_to(root))}:{number}"
        if has_entity(article):
            report.drop("uses entities", place)
            continue
        example = _example(article, place, report)
        if example is None:
            continue
        if example.id in seen:
            report.drop("the same version twice in a file", place)
            continue
        seen.add(example.id)
        yield example


def _example(article: etree._Element, place: str, report: Report) -> Example | None:
    if article.tag == "PubmedBookArticle":
        report.drop("record of a book", place)
        return None
    citation = article.find("MedlineCitation")
    pmid = None if citation is None else citation.find("PMID")
    body = None if citation is None else citation.find("Article")
    if citation is None or pmid is None or body is None:
        report.drop("no MedlineCitation, PMID or Article", place)
        return None
    number, version = (pmid.text or "").strip(), pmid.get("Version", "1")
    if not (_PMID.fullmatch(number) and _VERSION.fullmatch(version)):
        report.drop("not a PMID", place)
        return None
    lines = _abstract(citation, body)
    if not lines:
        report.drop("no abstract", place)
        return None
    title = _title(body)
    text = "\n".join(lines)
    meta = {"language": body.findtext("Language", "").strip()}
    example_id = f"{int(number)}.{int(version)}"
    return Example(example_id, f"{title}\n\n{text}" if title else text, meta)


def _title(body: etree._Element) -> str:
    title = text_of(body.find("ArticleTitle"))
    found = _TRANSLATED.fullmatch(title)
    if not found:
        return title
    inside = found[1].strip()
    if inside.rstrip(".").lower() in _NO_TITLES:
        return ""
    return inside if inside.endswith((".", "?", "!")) else inside + "."


def _abstract(citation: etree._Element, body: etree._Element) -> list[str]:
    abstract = body.find("Abstract")
    lines = [] if abstract is None else _lines(abstract)
    if not lines:
        for other in citation.iterfind("OtherAbstract"):
            if other.get("Language", "eng") == "eng":
                lines = _lines(other)
                if lines:
                    break
    return lines


def _lines(abstract: etree._Element) -> list[str]:
    lines = []
    for part in abstract.iterfind("AbstractText"):
        text = text_of(part)
        label = " ".join(part.get("Label", "").split()).rstrip(":")
        if text:
            lines.append(f"{label}: {text}" if label and label != "UNLABELLED" else text)
    return lines


SOURCE = Source(
    name="pubmed",
    title="PubMed baseline and update files",
    homepage="https://pubmed.ncbi.nlm.nih.gov/download/",
    access="open",
    license="NLM terms and conditions; some abstracts may be under copyright",
    citation="National Library of Medicine, PubMed, https://pubmed.ncbi.nlm.nih.gov",
    files=(
        "pubmed[0-9][0-9]n[0-9][0-9][0-9][0-9].xml.gz",
        "pubmed[0-9][0-9]n[0-9][0-9][0-9][0-9].xml",
        "pubmed[0-9][0-9]n[0-9][0-9][0-9][0-9][0-9].xml.gz",
        "pubmed[0-9][0-9]n[0-9][0-9][0-9][0-9][0-9].xml",
    ),
    read=read,
    revisions=Revisions(age, scan, key),
    kind="biomedical",
)
