"""MB/s of XML through the readers of PubMed and PMC, on one core, and their memory.

    python tests/benchmarks/xml_readers.py --data DIR [--megabytes 200] [--json FILE]

DIR holds pubmed/ and pmc/ with real files. Their records are copied under new ids until there are
as many megabytes of XML; what is timed is a .xml.gz file and a .tar.gz package, unpacking included.
MB are 10^6 bytes of unpacked XML. The rate by CPU seconds is the one to compare on a busy machine.
"""

import argparse
import concurrent.futures
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, os.fspath(pathlib.Path(__file__).resolve().parents[2]))

from train.corpora.source import Report, Source
from train.corpora.sources import pmc, pubmed

_ARTICLE = re.compile(rb"<PubmedArticle>.*?</PubmedArticle>", re.S)
_PMID = re.compile(rb"(<MedlineCitation[^>]*>\s*<PMID[^>]*>)\d+")


def make_pubmed(data: pathlib.Path, path: pathlib.Path, size: int) -> int:
    """Writes a file of `size` bytes of XML; returns the bytes written."""
    articles = [
        article
        for source in sorted((data / "pubmed").rglob("*.xml.gz"))
        for article in _ARTICLE.findall(gzip.decompress(source.read_bytes()))
    ]
    written = 0
    with gzip.open(path, "wb", compresslevel=6) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for number, article in enumerate(itertools.cycle(articles), start=1):
            written += file.write(_PMID.sub(rb"\g<1>%d" % number, article, count=1) + b"\n")
            if written >= size:
                break
        file.write(b"</PubmedArticleSet>\n")
    return written


def make_pmc(data: pathlib.Path, path: pathlib.Path, size: int) -> int:
    """Writes a package of `size` bytes of XML; returns the bytes written."""
    articles = [source.read_bytes() for source in sorted((data / "pmc").glob("*.nxml"))]
    written = 0
    with tarfile.open(path, "w:gz", compresslevel=6) as tar:
        for number, article in enumerate(itertools.cycle(articles), start=1):
            member = tarfile.TarInfo(f"PMC000xxxxxx/PMC{number}.xml")
            member.size = len(article)
            tar.addfile(member, io.BytesIO(article))
            written += len(article)
            if written >= size:
                break
    return written


def peak_mb() -> float:
    """The most memory that this process has had. (getrusage counts its parent's, too.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def read(source: Source, path: pathlib.Path) -> tuple[int, int]:
    """(documents, characters)."""
    count = letters = 0
    for example in source.read(path, path.parent, Report()):
        count += 1
        letters += len(example.text)
    return count, letters


def scan(source: Source, path: pathlib.Path) -> tuple[int, int]:
    """(ids, 0)."""
    assert source.revisions
    return len(source.revisions.scan(path)), 0


def measure(name: str, action: Callable, path: pathlib.Path, size: int) -> dict:
    """Times an action on a source; for a process of its own, whose memory is that of the action."""
    source = {"pubmed": pubmed, "pmc": pmc}[name].SOURCE
    before = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    count, letters = action(source, path)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "what": f"{name} {action.__name__}",
        "xml_mb": round(size / 1e6, 1),
        "packed_mb": round(path.stat().st_size / 1e6, 1),
        "records": count,
        "text_mb": round(letters / 1e6, 1),
        "mb_per_second": round(size / 1e6 / wall, 1),
        "mb_per_cpu_second": round(size / 1e6 / cpu, 1),
        "memory_grew_mb": round(peak_mb() - before, 1),
    }


def alone(*arguments) -> dict:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        row = pool.submit(measure, *arguments).result()
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        makers = (
            (pubmed.SOURCE, make_pubmed, "pubmed26n0001.xml.gz"),
            (pmc.SOURCE, make_pmc, "oa_comm_xml.PMC000xxxxxx.baseline.2026-01-01.tar.gz"),
        )
        for source, make, name in makers:
            # A quarter first: what memory grows by then is no matter of size.
            for share in (0.25, 1):
                path = pathlib.Path(folder, f"{share}", name)
                path.parent.mkdir(exist_ok=True)
                size = make(arguments.data, path, int(arguments.megabytes * share * 1e6))
                rows.append(alone(source.name, read, path, size))
            rows.append(alone(source.name, scan, path, size))
    facts = {
        "command": "python tests/benchmarks/xml_readers.py --data DIR "
        f"--megabytes {arguments.megabytes:g}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    print(f"load average {facts['load']:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
