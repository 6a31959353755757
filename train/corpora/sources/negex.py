"""NegEx: de-identified sentences from hospital reports, marked for negation, time and experiencer.

Layout: `rsAnnotations-1-120-random.txt`, a header and 2,376 rows separated by tabs: line number,
Condition, sentence, negation, temporality, experiencer.

A document is a sentence. One with several conditions has several rows; 2,056 are distinct. The
table `Annotations-1-120-random.txt` has the same sentences and is not read.
"""

from ..readers.formats import table
from ..source import Source

SOURCE = Source(
    name="negex",
    title="NegEx test set",
    homepage="https://github.com/chapmanbe/negex",
    access="open",
    license="Apache-2.0",
    citation="Chapman et al., A simple algorithm for identifying negated findings and diseases in "
    "discharge summaries, Journal of Biomedical Informatics, 2001",
    files=("rsAnnotations-1-120-random.txt",),
    read=table("sentence", delimiter="\t"),
    documents=2_056,
    tokens=100_000,
)
