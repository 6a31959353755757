"""MTSamples: sample reports from a transcription service, all specialties.

Layout: `mtsamples.csv`, 4,999 rows: an unnamed index, description, medical_specialty, sample_name,
transcription, keywords. Newlines were flattened to ",", and values have spaces at both ends.

A document is the transcription. Many are listed under two specialties: 2,357 are distinct and not
empty (the model card has 2,358, perhaps with the empty one).
"""

from ..readers.formats import table
from ..source import Source

SOURCE = Source(
    name="mtsamples",
    title="MTSamples",
    homepage="https://www.kaggle.com/datasets/tboyle10/medicaltranscriptions",
    access="open",
    license="CC0",
    citation="mtsamples.com, collected by T. Boyle on Kaggle",
    files=("mtsamples.csv",),
    read=table("transcription", specialty="medical_specialty"),
    documents=2_358,
    tokens=1_700_000,
)
