"""PMC Open Access: title, abstract and body of articles.

Layout: bulk packages oa_{comm,noncomm,other}_xml.PMC0NNxxxxxx.baseline.DATE.tar.gz and
oa_*_xml.incr.DATE.tar.gz, or single .nxml files. Each article is a JATS document (1.x), or one of
NLM's archiving DTD 2.3. A package is streamed and never unpacked to disk. The newest package that
contains an article is used.

A document is an article's title, its abstracts (except graphical ones and teasers), its body with
section titles, and at the end the captions of figures and tables, which would interrupt paragraphs.
Sections follow an empty line, each paragraph is a line. Left out: references and all other back
matter, numbers that cite references ("[3,4-7]"; author and year are kept), table cells, displayed
formulas, TeX, footnotes, labels, supplements, and reviews and translations within the article.
Articles without a body are dropped and counted: PubMed has their abstracts.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module)

from ..readers.archives import LARGEST_MEMBER, members
from ..readers.markup import ANNOTATIONS, Entities, one_line, parse, set_apart, string, text_of
from ..source import Example, Report, Revisions, Source, name_of, records_of

_FLOATS = ("fig", "table-wrap", "fig-group", "table-wrap-group", "chem-struct-wrap", "graphic")
# Left out, each with a break in its place.
_LEFT_OUT_BLOCKS = (
    "{*}table", "table-wrap-foot", "array", "disp-formula", "disp-formula-group", "ref-list",
    "fn-group", "graphic", "media", "supplementary-material", "contrib-group",
)  # fmt: skip
_LEFT_OUT = (
    *_LEFT_OUT_BLOCKS, *ANNOTATIONS, "fn", "label", "object-id", "permissions", "attrib",
    "inline-graphic", "inline-supplementary-material", "sub-article", "response",
)  # fmt: skip
_BLOCKS = (
    "sec", "p", "title", "list", "list-item", "def-item", "disp-quote", "boxed-text", "statement",
    "speech", "verse-line", "preformat", "code", "caption",
)  # fmt: skip
_OTHER_ABSTRACTS = {"graphical", "toc", "teaser", "short", "web-summary", "video", "key-points"}
# Marks for line, section and citation. XML white space in the text becomes spaces, so paragraphs
# need their own characters.
_LINE, _SECTION, _CITED = "\u2028", "\u2029", "\ufffc"
_NUMBERS = re.compile(r"[\s\[(]*[SR]?\d{1,3}[a-z]?(?:[\s,;\u2013\u2014-]+\d{1,3}[a-z]?)*[\s\])]*")
_BETWEEN = r"[ \t\r\n\u00a0,;\u2013\u2014-]*"
_CITATIONS = re.compile(
    rf"[\[(](?:{_BETWEEN}{_CITED})+{_BETWEEN}[\])]|{_CITED}(?:{_BETWEEN}{_CITED})+"
)
_PMCID = re.compile(r"PMC(\d{1,8})(?!\d)")
_PACKAGE = re.compile(r"\.(baseline|incr)\.(\d{4}-\d\d-\d\d)")


def age(part: pathlib.Path) -> tuple[str, bool]:
    """The sort key of a package: (date, whether it is an increment). Single files come first."""
    found = _PACKAGE.search(part.name)
    return (found[2], found[1] == "incr") if found else ("", False)


def key(example_id: str) -> tuple[int, int]:
    """(PMCID, version) of an id. PMC has one version of each article."""
    return int(example_id.removeprefix("PMC")), 1


def scan(part: pathlib.Path) -> np.ndarray:
    """Finds the PMCIDs in a package, from the names of its members where possible."""
    return records_of((int(pmcid), 1, False) for pmcid in _scan(part))


def _scan(part: pathlib.Path) -> Iterator[str]:
    for _, name, data in _documents(part, part.parent, Report()):
        pmcid = _of_name(name)
        if pmcid:
            yield pmcid
            continue
        try:
            meta = parse(data, str(part)).find("front/article-meta")
        except ValueError:
            continue
        yield from filter(None, [_of_meta(meta)])


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """Yields the articles of a package or file. Raises ValueError if it is incomplete."""
    seen: set[int] = set()
    single = not _is_package(part)
    for place, name, data in _documents(part, root, report):
        try:
            article = parse(data, place)
        except ValueError as error:
            if single:
                raise
            uses = isinstance(error, Entities)
            report.drop("declares or uses entities" if uses else "not well-formed XML", place)
            continue
        example = _example(article, name, place, report)
        if example is None:
            continue
        number, _ = key(example.id)
        if number in seen:
            report.drop("the same article twice in a package", place)
            continue
        seen.add(number)
        yield example


def _is_package(part: pathlib.Path) -> bool:
    return part.name.endswith((".tar.gz", ".tar", ".tgz"))


def _documents(
    part: pathlib.Path, root: pathlib.Path, report: Report
) -> Iterator[tuple[str, str, bytes]]:
    """Yields (place, name, bytes) of each article."""
    relative = name_of(part.relative_to(root))
    if not _is_package(part):
        if part.stat().st_size > LARGEST_MEMBER:
            raise ValueError(f"{part}: an article is larger than any real one; it is not read")
        yield relative, part.name, part.read_bytes()
        return
    articles = members(part, report, lambda name: name.endswith((".nxml", ".xml")))
    for number, (name, data) in enumerate(articles, start=1):
        yield f"{relative}:{number}", name, data


def _of_name(name: str) -> str:
    found = _PMCID.search(name.rsplit("/", 1)[-1])
    return found[1].lstrip("0") if found else ""


def _of_meta(meta: etree._Element | None) -> str:
    ids = [] if meta is None else meta.findall("article-id")
    for article_id in ids:
        if article_id.get("pub-id-type") in ("pmc", "pmcid"):
            digits = text_of(article_id).upper().removeprefix("PMC")
            if re.fullmatch("[0-9]{1,8}", digits):
                return digits.lstrip("0")
    return ""


def _example(article: etree._Element, name: str, place: str, report: Report) -> Example | None:
    meta, body = article.find("front/article-meta"), article.find("body")
    if meta is None:
        report.drop("no article", place)
        return None
    pmcid = _of_name(name) or _of_meta(meta)
    if not pmcid:
        report.drop("no PMC id", place)
        return None
    captions = [] if body is None else _captions(body)
    text = "" if body is None else _text(body)
    if not text:
        report.drop("no body", place)
        return None
    for tag in ("floats-group", "floats-wrap"):  # the second before NLM's DTD 3.0
        floats = article.find(tag)
        captions += [] if floats is None else _captions(floats)
    pmids = [text_of(x) for x in meta.iterfind("article-id") if x.get("pub-id-type") == "pmid"]
    facts = {"license": license(meta), "pmid": "".join(pmids[:1])}
    abstracts = [
        _text(abstract)
        for abstract in meta.iterfind("abstract")
        if abstract.get("abstract-type") not in _OTHER_ABSTRACTS
    ]
    blocks = [_title(meta), *abstracts, text, "\n".join(captions)]
    facts = {name: value for name, value in facts.items() if value}
    return Example(f"PMC{pmcid}", "\n\n".join(filter(None, blocks)), facts)


def _title(meta: etree._Element) -> str:
    title = meta.find("title-group/article-title")
    if title is None:
        return ""
    etree.strip_elements(title, "xref", with_tail=False)
    return one_line(_text(title))


def _captions(body: etree._Element) -> list[str]:
    """The captions, one on each line; removes figures and tables from the tree."""
    _leave_out(body)
    lines = []
    for caption in body.iter("caption"):
        parent = caption.getparent()
        if parent is not None and parent.tag in _FLOATS:
            lines.append(one_line(_text(caption)))
    set_apart(body, _FLOATS)
    etree.strip_elements(body, *_FLOATS, with_tail=False)
    return list(filter(None, lines))


def _leave_out(element: etree._Element) -> None:
    set_apart(element, _LEFT_OUT_BLOCKS)
    etree.strip_elements(element, *_LEFT_OUT, with_tail=False)


def _text(element: etree._Element) -> str:
    """The text with sections after an empty line and paragraphs as lines. Changes the tree."""
    _leave_out(element)
    set_apart(element, ("break",))
    for xref in element.iter("xref"):
        if xref.get("ref-type") == "bibr" and _NUMBERS.fullmatch(text_of(xref)):
            xref.clear(keep_tail=True)
            xref.text = _CITED
    for block in element.iter(*_BLOCKS):
        block.text = (_SECTION if block.tag == "title" else _LINE) + (block.text or "")
        block.tail = _LINE + (block.tail or "")
    text = _CITATIONS.sub(_CITED, string(element))
    sections = []
    for section in text.split(_SECTION):
        lines = [_line(line) for line in section.split(_LINE)]
        sections.append("\n".join(filter(None, lines)))
    return "\n\n".join(filter(None, sections))


def _line(text: str) -> str:
    return one_line(text).replace(" " + _CITED, "").replace(_CITED, "")


# Licenses

_DEED = re.compile(r"creativecommons\.org/(licenses|publicdomain)/([a-z+-]+)(?:/(\d\.\d))?", re.I)
_WORDS = re.compile(
    r"creative\s+commons\s+attribution(?P<nc>[\s-]*non-?\s?commercial)?"
    r"(?:[\s-]*(?P<nd>no-?\s?deriv\w*)|[\s-]*(?P<sa>share-?\s?alike))?",
    re.I,
)


def license(meta: etree._Element) -> str:
    """Finds the license of an article in its article-meta: "CC BY 2.0", "CC BY-NC", "CC0 1.0",
    "public domain", or nothing.

    It is a link (in <license>, or an <ext-link> or <ali:license_ref> in it), a sentence in
    <license> or, before JATS, a sentence in <copyright-statement>. A link is more precise and comes
    first.
    """
    parts = [
        element
        for tag in ("license", "copyright-statement", "{*}license_ref")
        for element in meta.iter(tag)
    ]
    links = [value for part in parts for node in part.iter("*") for value in node.values()]
    sentences = [text_of(part) for part in parts]
    for found in filter(None, map(_DEED.search, links + sentences)):
        kind, name, version = found[1].lower(), found[2].lower(), found[3]
        if kind == "publicdomain":
            name = "CC0" if name == "zero" else "public domain"
            return f"{name} {version}" if version and name == "CC0" else name
        return f"CC {name.upper()}" + (f" {version}" if version else "")
    for sentence in sentences:
        found = _WORDS.search(sentence)
        if found:
            return "CC BY" + "".join(f"-{x.upper()}" for x in ("nc", "nd", "sa") if found[x])
        if re.search(r"\bCC0\b", sentence):
            return "CC0"
        if "public domain" in sentence.lower():
            return "public domain"
    return ""


SOURCE = Source(
    name="pmc",
    title="PMC Open Access Subset",
    homepage="https://pmc.ncbi.nlm.nih.gov/tools/openftlist/",
    access="open",
    license="each article's own, in its meta: CC0, CC BY, CC BY-NC and others",
    citation="National Library of Medicine, PMC Open Access Subset, "
    "https://pmc.ncbi.nlm.nih.gov/tools/openftlist/",
    files=("oa_comm_xml*.tar.gz", "oa_noncomm_xml*.tar.gz", "oa_other_xml*.tar.gz", "*.nxml"),
    read=read,
    revisions=Revisions(age, scan, key),
    kind="biomedical",
)
