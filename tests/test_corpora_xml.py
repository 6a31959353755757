"""PubMed and PMC: real files with counts made by hand, and files with the traps of both."""

import gzip
import os
import pathlib
import pickle
import tarfile
import tracemalloc

import pytest

from tests.xml_files import article, deletion, jats, package, write
from train.corpora.build.revisions import resolve
from train.corpora.readers import archives, markup
from train.corpora.source import Report
from train.corpora.sources import pmc, pubmed

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real files in shared/data")


def read(source, part: pathlib.Path, root: pathlib.Path | None = None):
    """(examples by id, report)."""
    report = Report()
    examples = list(source.read(part, root or part.parent, report))
    assert len({example.id for example in examples}) == len(examples)
    return {example.id: example for example in examples}, report


# PubMed, real files


@needs_data
def test_the_real_baseline_and_update_files():
    root = DATA / "pubmed"
    baseline, updates = pubmed.SOURCE.parts(root)
    assert (baseline.name, updates.name) == ("pubmed26n1334.xml.gz", "pubmed26n1335.xml.gz")

    examples, report = read(pubmed.SOURCE, baseline, root)
    assert len(examples) == 27 and report.dropped == {"no abstract": 3}
    assert report.places["no abstract"] == [
        f"baseline/pubmed26n1334.xml.gz:{number}" for number in (3, 17, 30)
    ]
    first = examples["41576520.1"]
    assert first.text.startswith("The Relationship of Serum Uric Acid With Neuro")
    assert [line.split(":")[0] for line in first.text.split("\n")[2:]] == [
        "BACKGROUND", "METHODS", "RESULTS", "CONCLUSIONS"
    ]  # fmt: skip
    assert "Elsevier" not in first.text and first.meta == {"language": "eng"}

    examples, report = read(pubmed.SOURCE, updates, root)
    assert len(examples) == 30 and not report.dropped
    assert "mean age (±s.d.) was 47.9 (±12.0) years" in examples["26228458.1"].text
    scanned = pubmed.scan(updates)
    assert scanned["id"][scanned["deleted"]].tolist() == [
        41456105, 41557076, 41616784, 41618748, 41618749, 41618779
    ]  # fmt: skip
    assert len(scanned) == 36


@needs_data
def test_the_real_pretty_printed_sample_of_2019():
    examples, report = read(pubmed.SOURCE, DATA / "pubmed" / "pubmedsample_2019.xml.gz")
    # 115 have an Abstract, 3 more an OtherAbstract of type PIP or NASA; 176 in all.
    assert len(examples) == 118 and report.dropped == {"no abstract": 58}
    assert not any("  " in example.text or "\t" in example.text for example in examples.values())
    translated = examples["8655018.1"]
    assert translated.meta == {"language": "pol"}
    assert translated.text.startswith(
        "Effect of fetal and neonatal growth on the occurrence of some diseases in adults.\n\n"
    )


# PubMed, files made here


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pubmed26n0001.xml.gz"


def text_of(file: pathlib.Path, record: str) -> str:
    examples, report = read(pubmed.SOURCE, write(file, record))
    assert not report.dropped
    (example,) = examples.values()
    return example.text


def test_labels_and_markup_become_lines_of_text(file):
    record = article(
        7,
        text="</AbstractText>"
        '<AbstractText Label="METHODS" NlmCategory="METHODS">CO<sub>2</sub> was <i>in\n vivo</i>'
        ', p&lt;<b>0</b>.05 &#955;<mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML">'
        "<mml:mi>x</mml:mi></mml:math>.</AbstractText>"
        '<AbstractText Label="UNLABELLED">No label.</AbstractText>'
        '<AbstractText Label="Aims:"><!-- not this --> Two.</AbstractText><AbstractText>',
        title="On <i>E. coli</i>\u00a0strains.",
    )
    assert text_of(file, record) == (
        "On E. coli strains.\n\nMETHODS: CO2 was in vivo, p<0.05 λx.\nNo label.\nAims: Two."
    )


MATH = (
    '<mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:semantics><mml:mi>x</mml:mi>'
    '<mml:annotation encoding="TeX">secret</mml:annotation></mml:semantics></mml:math>'
)
# What stands in a paragraph, what becomes of it in PMC and in PubMed.
APART = [
    ("is given by<disp-formula/>where", "is given by where"),
    ("by<disp-formula><tex-math>x</tex-math></disp-formula>, where", "by, where"),
    ("by <disp-formula><label>(1)</label></disp-formula> .", "by."),
    ("End.<fig><caption><p>C.</p></caption></fig>Next.", "End. Next.\n\nC."),
    ("End.<table-wrap/>Next", "End. Next"),
    ("a<array><tbody><tr><td>b</td></tr></tbody></array>c", "a c"),
    ("one<break/>two (a<break/>).", "one two (a)."),
    ("in<italic>line</italic>, H<sub>2</sub>O<fn><p>F.</p></fn>s", "inline, H2Os"),
    (f"f({MATH}) is", "f(x) is"),
]


@pytest.mark.parametrize(("inside", "expected"), APART)
def test_blocks_and_breaks_separate_words(tmp_path, inside, expected):
    text = one(tmp_path, jats(body=f"<p>{inside}</p>")).text
    assert text == f"On mice\n\n{expected}"


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("by<DispFormula>{}</DispFormula>where", "by x where"),
        ("by<DispFormula>{}</DispFormula>.", "by x."),
        ("f({}) is", "f(x) is"),
    ],
)
def test_formulas_of_abstracts(file, inside, expected):
    assert text_of(file, article(7, text=inside.format(MATH))) == f"A title.\n\n{expected}"
    assert text_of(file, article(7, title=inside.format(MATH))) == f"{expected}\n\nText."


def test_titles_and_captions_of_older_articles(tmp_path):
    """A title in two lines, and where the captions are before NLM's DTD 3.0."""
    floats = "<floats-wrap><fig><caption><p>Floating.</p></caption></fig></floats-wrap>"
    data = jats(rest=floats).replace(b"On <italic>", b"One<break/>or<break/>two <italic>")
    assert one(tmp_path, data).text == "One or two mice\n\nText.\n\nFloating."


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("[The beriberi heart].", "The beriberi heart."),
        ("[Is it the [13C]urea test?]", "Is it the [13C]urea test?"),
        ("[Retracted] A study.", "[Retracted] A study."),
        ("[A] and [B].", "[A] and [B]."),
        ("[Not Available].", ""),
        ("[In Process Citation]", ""),
        ("Not available.", "Not available."),
        ("", ""),
    ],
)
def test_brackets_of_translated_titles_go(file, title, expected):
    assert text_of(file, article(7, title=title)) == (f"{expected}\n\nText.".lstrip())


def test_other_abstracts_stand_in_when_english(file):
    def other(language, text):
        return (
            f'<OtherAbstract Type="Publisher" Language="{language}">'
            f"<AbstractText>{text}</AbstractText></OtherAbstract>"
        )

    both = other("fre", "Autre.") + other("eng", "Other.")
    assert text_of(file, article(7, text="", rest=both)) == "A title.\n\nOther."
    assert text_of(file, article(7, rest=both)) == "A title.\n\nText."
    _, report = read(pubmed.SOURCE, write(file, article(7, text="", rest=other("fre", "Autre."))))
    assert report.dropped == {"no abstract": 1}


def test_broken_records_are_counted_with_their_places(file):
    write(
        file,
        article(1),
        "<PubmedArticle><MedlineCitation/></PubmedArticle>",
        article("secret"),
        article(2, text="a &unknown; b"),
        article(3, text="  "),
        "<PubmedBookArticle><BookDocument/></PubmedBookArticle>",
        article(1),
        article(4, version="x"),
        article(5),
        # Entities of a DTD that is not loaded are no error of form.
        doctype='<!DOCTYPE PubmedArticleSet SYSTEM "http://127.0.0.1:9/pubmed.dtd">',
    )
    examples, report = read(pubmed.SOURCE, file)
    assert list(examples) == ["1.1", "5.1"]
    assert report.places == {
        "no MedlineCitation, PMID or Article": [f"{file.name}:2"],
        "not a PMID": [f"{file.name}:3", f"{file.name}:8"],
        "uses entities": [f"{file.name}:4"],
        "no abstract": [f"{file.name}:5"],
        "record of a book": [f"{file.name}:6"],
        "the same version twice in a file": [f"{file.name}:7"],
    }


def fails(source, part: pathlib.Path) -> str:
    with pytest.raises(ValueError) as caught:
        read(source, part)
    message = str(caught.value)
    assert "\n" not in message and part.name in message and "secret" not in message
    return message


def test_broken_files_fail_with_one_line(file):
    good = write(file, *(article(number, "secret text") for number in range(1, 200)))
    data = good.read_bytes()
    file.write_bytes(data[:-300])
    assert "md5" in fails(pubmed.SOURCE, file)
    file.with_name(file.name + ".md5").unlink()
    assert "damaged or cut" in fails(pubmed.SOURCE, file)
    with pytest.raises(ValueError, match="damaged or cut"):
        pubmed.scan(file)
    file.write_bytes(data[:-8] + bytes(8))
    assert "damaged or cut" in fails(pubmed.SOURCE, file)
    write(file, article(1), "<secret></b>", md5=False)
    assert "not well-formed XML at line" in fails(pubmed.SOURCE, file)
    file.write_bytes(gzip.compress(b"secret notes"))
    assert "not well-formed XML" in fails(pubmed.SOURCE, file)
    file.with_name(file.name + ".md5").write_text("secret")
    assert "expected a line" in fails(pubmed.SOURCE, file)


def laughs() -> str:
    lines = ['<!ENTITY l0 "lol">'] + [
        f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12)
    ]
    return f"<!DOCTYPE x [{''.join(lines)}]>"


def outside(path: pathlib.Path) -> str:
    path.write_text("secret")
    return f'<!DOCTYPE x [<!ENTITY e SYSTEM "{path.as_uri()}">]>'


@pytest.mark.parametrize("where", ["text", "attribute"])
def test_entities_are_not_resolved(file, tmp_path, where):
    def record(entity):
        if where == "text":
            return article(7, text=f"a {entity} b")
        return article(7).replace("<AbstractText>", f'<AbstractText Label="{entity}">')

    outer = outside(tmp_path / "f")
    tracemalloc.start()
    for doctype, entity in ((laughs(), "&l11;"), (laughs(), "&l2;"), (outer, "&e;")):
        write(file, record(entity), doctype=doctype)
        message = fails(pubmed.SOURCE, file)
        assert "entities" in message or "not well-formed" in message
        path = tmp_path / "PMC1.nxml"
        content = f"<p>{entity}</p>" if where == "text" else f'<p id="{entity}">x</p>'
        path.write_text(f"{doctype}<article><body>{content}</body></article>")
        message = fails(pmc.SOURCE, path)
        assert "entities" in message or "not well-formed" in message
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_record_has_a_largest_size(file, monkeypatch):
    monkeypatch.setattr(markup, "LARGEST_RECORD", 300_000)
    many = [article(number, "word " * 20_000) for number in range(1, 11)]  # 1 MB in all
    assert len(read(pubmed.SOURCE, write(file, *many))[0]) == 10
    # Many small elements: libxml2 itself bounds a single text.
    write(file, article(1, "<b>w</b>" * 100_000))
    assert "larger than any real one" in fails(pubmed.SOURCE, file)


def test_memory_does_not_grow_with_the_file(tmp_path):
    resident = pathlib.Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("reads /proc")
    path = write(tmp_path / "a.xml.gz", *(article(n, "a b " * 500) for n in range(1, 10_001)))
    pages = [
        int(resident.read_text().split()[1])
        for example in pubmed.SOURCE.read(path, tmp_path, Report())
        if int(example.id.split(".")[0]) % 200 == 0
    ]
    assert len(pages) == 50
    # Of 24 MB: the trees of all records hold more than that.
    assert (pages[-1] - pages[0]) * os.sysconf("SC_PAGE_SIZE") < 8e6


# PubMed, revisions


def test_names_of_files_with_more_digits(tmp_path):
    for name in ("pubmed26n0001.xml.gz", "pubmed26n10000.xml.gz", "pubmed26n9999.xml.gz"):
        write(tmp_path / name, article(1))
    parts = pubmed.SOURCE.revisions.in_order(pubmed.SOURCE.parts(tmp_path))
    assert [pubmed.age(part) for part in parts] == [(26, 1), (26, 9999), (26, 10000)]


@pytest.fixture
def revised(tmp_path):
    """A baseline of two files and updates; the names sort against their order in time."""
    root = tmp_path / "pubmed"
    write(
        root / "z" / "pubmed26n0001.xml.gz",
        *map(article, (1, 2, 3, 4)),
        article(5),
        article(5, "V2.", 2),
    )
    write(root / "z" / "pubmed26n0002.xml.gz", article(6), article(7), article(8, "V2.", 2))
    write(root / "a" / "pubmed26n0003.xml.gz", article(2, "New."), article(6, ""), deletion((3, 1)))
    write(
        root / "a" / "pubmed26n0010.xml.gz",
        article(2, "Newest."),
        article(3, "Again."),
        article(8, "V1.", 1),
        deletion((4, 1), (5, 2), (1234, 1), (7, 2)),
    )
    return root


def resolved(root: pathlib.Path, folder: pathlib.Path, workers: int = 1) -> dict[str, str]:
    parts = pubmed.SOURCE.parts(root)
    newest = resolve(pubmed.SOURCE.revisions, parts, folder, workers)
    newest = pickle.loads(pickle.dumps(newest))
    kept = {}
    for part in parts:
        for example in pubmed.SOURCE.read(part, root, Report()):
            if newest(part, example.id):
                assert example.id not in kept
                kept[example.id] = example.text.split("\n")[-1]
    return kept


EXPECTED = {
    "1.1": "Text.",
    "2.1": "Newest.",  # revised twice
    "3.1": "Again.",  # deleted, then there again
    # 4 is deleted
    "5.1": "Text.",  # its version 2 is deleted
    # 6 was revised to have no abstract
    "7.1": "Text.",  # a version that never was is deleted
    "8.2": "V2.",  # version 1 came later, and is not the newest
}


def test_revisions_and_deletions(revised, tmp_path):
    assert resolved(revised, tmp_path / "index") == EXPECTED


def test_resolving_again_scans_what_is_new(revised, tmp_path, monkeypatch):
    index = tmp_path / "index"
    assert resolved(revised, index, workers=2) == EXPECTED
    before = resolve(pubmed.SOURCE.revisions, pubmed.SOURCE.parts(revised), index).fingerprint
    scanned = []
    scan = pubmed.SOURCE.revisions.scan

    def spy(part):
        scanned.append(part.name)
        return scan(part)

    source = pubmed.SOURCE.revisions.__class__(pubmed.age, spy, pubmed.key)
    write(revised / "a" / "pubmed26n0011.xml.gz", deletion((1, 1)))
    after = resolve(source, pubmed.SOURCE.parts(revised), index)
    assert scanned == ["pubmed26n0011.xml.gz"] and after.fingerprint != before
    assert resolved(revised, index) == {k: v for k, v in EXPECTED.items() if k != "1.1"}


def test_a_broken_update_stops_before_anything_is_read(revised, tmp_path):
    path = revised / "a" / "pubmed26n0010.xml.gz"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="pubmed26n0010.xml.gz: expected md5"):
        resolved(revised, tmp_path / "index")
    path.write_bytes(good)
    assert resolved(revised, tmp_path / "index") == EXPECTED


def test_the_scan_sees_what_the_parser_sees(tmp_path, monkeypatch):
    records = [article(n, "t " * (n % 97), 1 + n % 3) for n in range(1, 400)]
    path = write(tmp_path / "pubmed26n0001.xml.gz", *records, deletion((5, 1), (70000000, 12)))
    expected = [(n, 1 + n % 3, False) for n in range(1, 400)] + [(5, 1, True), (70000000, 12, True)]
    for chunk in (64, 1000, 1 << 20):  # tags are cut at every place
        monkeypatch.setattr(pubmed, "_CHUNK", chunk)
        assert pubmed.scan(path).tolist() == expected


# PMC, real files


@needs_data
@pytest.mark.parametrize(
    ("name", "pmcid", "license", "blocks", "captions"),
    [
        # Blocks: the title, parts of abstract and body (with a title, or before the first one),
        # counted in the files, and the captions, which are those of figures and tables.
        ("1471-2180-11-174.nxml", "PMC3166277", "CC BY 2.0", 1 + 3 + 23 + 1, 4 + 3),
        ("ehp-116-1694.nxml", "PMC2599765", "public domain", 1 + 5 + 1 + 18 + 1, 3),
        ("pntd.0002065.nxml", "PMC3585041", "CC BY", 1 + 1 + 1 + 13 + 1, 1 + 5),
        ("pone.0000217.nxml", "PMC1790863", "CC BY", 1 + 3 + 21 + 1, 3),
    ],
)
def test_the_real_articles(name, pmcid, license, blocks, captions):
    examples, report = read(pmc.SOURCE, DATA / "pmc" / name)
    assert list(examples) == [pmcid] and not report.dropped
    example = examples[pmcid]
    assert example.meta["license"] == license
    found = example.text.split("\n\n")
    assert len(found) == blocks and len(found[-1].split("\n")) == captions
    assert not any(residue in example.text for residue in ("[]", "()", " .", " ,", "  ", "\ufffc"))


@needs_data
def test_the_real_articles_keep_prose_and_lose_the_rest():
    text = read(pmc.SOURCE, DATA / "pmc" / "1471-2180-11-174.nxml")[0]["PMC3166277"].text
    assert text.startswith("Factors influencing lysis time stochasticity in bacteriophage λ\n\n")
    assert "identical environments and genotypes. Population heterogeneity, resulting" in text
    assert "late promoter (pR') activity, and host growth rate" in text
    assert "IN56 (WT)" not in text  # a table's cell
    # Author and year are part of the sentence.
    text = read(pmc.SOURCE, DATA / "pmc" / "ehp-116-1694.nxml")[0]["PMC2599765"].text
    assert "tissues of humans and wildlife (Hites 2004; Law et al. 2003). The" in text


# PMC, files made here


def one(tmp_path: pathlib.Path, data: bytes):
    path = tmp_path / "a.nxml"
    path.write_bytes(data)
    examples, report = read(pmc.SOURCE, path)
    assert not report.dropped
    return examples["PMC12"]


def test_what_an_article_becomes(tmp_path):
    bibr = '<xref ref-type="bibr" rid="B1">{}</xref>'
    body = f"""
      <p>Before any section.</p>
      <sec id="s1"><label>1.</label><title>Methods</title>
        <p>We saw this [{bibr.format(1)},{bibr.format("3-5")}] and
           that<sup>{bibr.format(7)},{bibr.format(8)}</sup>, as did Lee ({bibr.format(2008)}) and
           {bibr.format("Kim et al. 2010")}; see Figure <xref ref-type="fig" rid="f1">1</xref>.
           <fig id="f1"><label>Figure 1</label><caption><title>Mice.</title>
             <p>Bars show SD [{bibr.format(9)}].</p></caption><graphic xlink:href="x.jpg"/></fig>
           It goes on<fn><p>A footnote.</p></fn>.</p>
        <disp-formula id="e1"><label>(1)</label><tex-math>\\begin{{x}}</tex-math></disp-formula>
        <p>With <inline-formula><alternatives><tex-math>\\alpha</tex-math><mml:math><mml:semantics>
           <mml:mi>α</mml:mi><mml:annotation>\\alpha</mml:annotation></mml:semantics></mml:math>
           </alternatives></inline-formula> and f() = 2:
           <list><list-item><label>a)</label><p>one</p></list-item><list-item><p>two</p></list-item>
           </list></p>
        <sec><title>Deeper</title><p>Down.</p>
          <table-wrap><label>Table 1</label><caption><p>Doses.</p></caption>
            <table><tr><td>12 mg</td></tr></table>
            <table-wrap-foot><p>Foot.</p></table-wrap-foot></table-wrap>
          <boxed-text><caption><title>Box</title></caption><p>Inside.</p></boxed-text>
        </sec>
        <supplementary-material><caption><p>Video.</p></caption></supplementary-material>
      </sec>"""
    abstract = (
        "<abstract><p>What we did.</p></abstract>"
        '<abstract abstract-type="graphical"><p>A picture.</p></abstract>'
        '<trans-abstract xml:lang="fr"><p>Autre.</p></trans-abstract>'
    )
    rest = (
        "<back><ack><p>Thanks.</p></ack><ref-list><ref><mixed-citation>Ref.</mixed-citation></ref>"
        "</ref-list></back><floats-group><fig><caption><p>Floating.</p></caption></fig></floats-group>"
        "<sub-article><body><p>A review.</p></body></sub-article>"
    )
    assert one(tmp_path, jats(body=body, abstract=abstract, rest=rest)).text == (
        "On mice\n\n"
        "What we did.\n\n"
        "Before any section.\n\n"
        "Methods\n"
        "We saw this and that, as did Lee (2008) and Kim et al. 2010; see Figure 1. It goes on.\n"
        "With α and f() = 2:\none\ntwo\n\n"
        "Deeper\n"
        "Down.\n\n"
        "Box\nInside.\n\n"
        "Mice. Bars show SD.\nDoses.\nFloating."
    )


LINK = "http://creativecommons.org/licenses/by-nc/4.0/"


@pytest.mark.parametrize(
    ("permissions", "expected"),
    [
        (f'<permissions><license xlink:href="{LINK}"/></permissions>', "CC BY-NC 4.0"),
        (
            '<permissions><license><license-p>Creative Commons Attribution, see <ext-link '
            f'xlink:href="{LINK}">it</ext-link></license-p></license></permissions>',
            "CC BY-NC 4.0",
        ),
        (
            '<permissions><license><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/">'
            f"{LINK}</ali:license_ref></license></permissions>",
            "CC BY-NC 4.0",
        ),
        (
            "<permissions><license><license-p>the Creative Commons Attribution\n"
            "Non-Commercial License, which</license-p></license></permissions>",
            "CC BY-NC",
        ),
        (
            "<permissions><license><p>Creative Commons Attribution-NonCommercial-NoDerivs"
            "</p></license></permissions>",
            "CC BY-NC-ND",
        ),
        (
            "<copyright-statement>Lee et al. Under the Creative Commons Attribution License, "
            "which permits</copyright-statement>",
            "CC BY",
        ),
        ('<permissions><license xlink:href="https://creativecommons.org/publicdomain/zero/1.0/"/>'
         "</permissions>", "CC0 1.0"),
        ("<permissions><license><p>This is in the public domain.</p></license></permissions>",
         "public domain"),
        ("<permissions><copyright-statement>All rights.</copyright-statement></permissions>", None),
    ],
)  # fmt: skip
def test_licenses(tmp_path, permissions, expected):
    assert one(tmp_path, jats(permissions=permissions)).meta.get("license") == expected


# Packages

NAME = "oa_comm_xml.PMC000xxxxxx.baseline.2026-01-01.tar.gz"


def test_packages_are_streamed_and_broken_articles_counted(tmp_path):
    path = package(
        tmp_path / NAME,
        ("PMC000xxxxxx/PMC12.xml", jats("12")),
        ("PMC000xxxxxx/PMC13.xml", b"<article><secret>"),
        ("PMC000xxxxxx/PMC14.xml", laughs().encode() + jats("14", "<p>&l3;</p>")),
        ("PMC000xxxxxx/PMC15.xml", jats("15", body="")),
        ("PMC000xxxxxx/PMC16.txt", b"no article"),
        ("PMC000xxxxxx/PMC12.nxml", jats("12")),
        ("PMC000xxxxxx/other.nxml", jats("PMC17")),
        ("PMC000xxxxxx/other.nxml", jats("secret")),
        ("PMC000xxxxxx/PMC18.xml", b"<html/>"),
    )
    examples, report = read(pmc.SOURCE, path)
    assert list(examples) == ["PMC12", "PMC17"]
    assert report.places == {
        "not well-formed XML": [f"{NAME}:2"],
        "declares or uses entities": [f"{NAME}:3"],
        "no body": [f"{NAME}:4"],
        "the same article twice in a package": [f"{NAME}:5"],
        "no PMC id": [f"{NAME}:7"],
        "no article": [f"{NAME}:8"],
    }


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_members_are_refused(tmp_path):
    article_12 = jats("12")
    path = package(
        tmp_path / NAME,
        ("../PMC1.xml", article_12),
        ("/etc/PMC2.xml", article_12),
        ("a/../../PMC3.xml", article_12),
        ("C:\\PMC4.xml", article_12),
        special("PMC5.xml", tarfile.SYMTYPE, "/etc/passwd"),
        special("PMC6.xml", tarfile.LNKTYPE, "PMC12.xml"),
        special("PMC7.xml", tarfile.CHRTYPE),
        special("PMC8.xml", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
        ("PMC12.xml", article_12),
    )
    before = sorted(tmp_path.rglob("*"))
    examples, report = read(pmc.SOURCE, path)
    assert list(examples) == ["PMC12"]
    assert report.dropped == {
        "archive: a path out of the folder": 4,
        "archive: a link": 2,
        "archive: not a plain file": 2,
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_do_not_expand_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FROM", 1 << 20)
    path = package(tmp_path / NAME, ("PMC1.xml", b" " * (8 << 20)))
    assert "expands more than 100 times" in fails(pmc.SOURCE, path)
    # After the archive's end, too.
    path.write_bytes(package(tmp_path / "x.gz", ("PMC1.xml", jats("1"))).read_bytes()
                     + gzip.compress(bytes(8 << 20)))  # fmt: skip
    assert "expands more than 100 times" in fails(pmc.SOURCE, path)

    monkeypatch.setattr(archives, "LARGEST_MEMBER", 1000)
    long = jats("2", "<p>" + "abcdefgh " * 200 + "</p>")
    path = package(tmp_path / NAME, ("PMC2.xml", long), ("PMC3.xml", jats("3")[:900]))
    assert read(pmc.SOURCE, path)[1].dropped["archive: a file too large"] == 1
    # A name as long as one likes is read whole by tarfile.
    monkeypatch.setattr(archives, "LARGEST_HEADER", 20_000)
    name = "a" * 100_000 + ".xml"
    for number, members in enumerate(([], [("PMC3.xml", jats("3"))])):
        path = package(tmp_path / f"oa_comm_xml{number}.tar", *members, (name, jats("12")))
        assert "larger than any real one" in fails(pmc.SOURCE, path)


def test_damaged_packages_fail_with_one_line(tmp_path):
    members = [(f"PMC{n}.xml", jats(str(n), f"<p>{n * 7919}</p>")) for n in range(1, 50)]
    path = package(tmp_path / NAME, *members)
    data = path.read_bytes()
    assert len(read(pmc.SOURCE, path)[0]) == 49
    for broken in (data[:-9], data[: len(data) // 2], data[:-8] + bytes(8)):
        path.write_bytes(broken)
        assert "damaged or cut" in fails(pmc.SOURCE, path)
    path.write_bytes(gzip.compress(b"secret" * 1000))
    assert "expected a complete .tar" in fails(pmc.SOURCE, path)
    plain = package(
        tmp_path / "oa_comm_xml.tar", ("PMC1.xml", jats("1", "<p>" + "w " * 9000 + "</p>"))
    )
    plain.write_bytes(plain.read_bytes()[:5000])
    fails(pmc.SOURCE, plain)


def test_the_newest_package_has_the_article(tmp_path):
    root = tmp_path / "pmc"
    root.mkdir()
    package(root / NAME, *[(f"PMC{n}.xml", jats(str(n))) for n in (1, 2, 3)])
    for name, text in (
        ("oa_comm_xml.incr.2026-01-02.tar.gz", "Older."),
        ("oa_comm_xml.incr.2026-01-10.tar.gz", "Newer."),
    ):
        package(root / name, ("x/PMC2.xml", jats("2", f"<p>{text}</p>")))
    older = "oa_noncomm_xml.PMC000xxxxxx.baseline.2025-06-01.tar.gz"
    package(root / older, ("PMC3.xml", jats("3")), ("PMC5.xml", jats("5")))
    same_day = "oa_comm_xml.incr.2025-06-01.tar.gz"
    package(root / same_day, ("PMC5.xml", jats("5", "<p>Same day.</p>")))
    (root / "alone.nxml").write_bytes(jats("4"))
    parts = pmc.SOURCE.parts(root)
    newest = resolve(pmc.SOURCE.revisions, parts, tmp_path / "index")
    kept = {
        example.id: (part.name.split(".")[1], example.text.split("\n")[-1])
        for part in parts
        for example in pmc.SOURCE.read(part, root, Report())
        if newest(part, example.id)
    }
    assert kept == {
        "PMC1": ("PMC000xxxxxx", "Text."),
        "PMC2": ("incr", "Newer."),
        "PMC3": ("PMC000xxxxxx", "Text."),
        "PMC4": ("nxml", "Text."),
        "PMC5": ("incr", "Same day."),
    }
    assert [part.name for part in pmc.SOURCE.revisions.in_order(parts)][1].startswith("oa_noncomm")
