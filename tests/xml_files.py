"""Files in the layout of PubMed and PMC, for tests."""

import gzip
import hashlib
import io
import pathlib
import tarfile

ABSTRACT = "<Abstract><AbstractText>{}</AbstractText></Abstract>"


def article(pmid, text: str = "Text.", version=1, title: str = "A title.", rest: str = "") -> str:
    abstract = ABSTRACT.format(text) if text else ""
    return (
        f'<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM">\n'
        f'  <PMID Version="{version}">{pmid}</PMID>\n'
        f"<Article><ArticleTitle>{title}</ArticleTitle>{abstract}<Language>eng</Language></Article>"
        f'{rest}<CommentsCorrectionsList><CommentsCorrections RefType="Cites">'
        f'<PMID Version="1">999</PMID></CommentsCorrections></CommentsCorrectionsList>'
        f"</MedlineCitation></PubmedArticle>\n"
    )


def deletion(*pmids: tuple[int, int]) -> str:
    ids = "".join(f'<PMID Version="{version}">{pmid}</PMID>\n' for pmid, version in pmids)
    return f"<DeleteCitation>{ids}</DeleteCitation>"


def write(path: pathlib.Path, *records: str, doctype: str = "", md5: bool = True) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    xml = '<?xml version="1.0" encoding="UTF-8"?>\n' + doctype
    xml += f"<PubmedArticleSet>{''.join(records)}</PubmedArticleSet>"
    data = gzip.compress(xml.encode(), mtime=0)
    path.write_bytes(data)
    if md5:
        digest = hashlib.md5(data).hexdigest()
        path.with_name(path.name + ".md5").write_text(f"MD5({path.name})= {digest}\n")
    return path


HEAD = (
    '<front><article-meta><article-id pub-id-type="pmc">{pmcid}</article-id>'
    '<article-id pub-id-type="pmid">55</article-id>'
    "<title-group><article-title>On <italic>mice</italic><xref>*</xref></article-title>"
    "</title-group>"
    "{permissions}{abstract}</article-meta></front>"
)


def jats(pmcid="12", body="<p>Text.</p>", permissions="", abstract="", rest="") -> bytes:
    head = HEAD.format(pmcid=pmcid, permissions=permissions, abstract=abstract)
    body = f"<body>{body}</body>" if body else ""
    spaces = (
        'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'
    )
    return f"<article {spaces}>{head}{body}{rest}</article>".encode()


def package(path: pathlib.Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> pathlib.Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path
