"""Social History: substances, occupation, living and family, in MTSamples' social-history sections.

As in the reference, words are separated by whitespace and an entity consists of the words that lie
entirely in it: it loses a last word with a full stop, and is skipped and counted if it has no other
word. This is kept because the published scores were measured this way.
"""

import pathlib
from collections import Counter

from .brat import BLANK_WORDS, documents, tag
from .files import token_data
from .task import Data, Task, published, three_ways

TYPES = (
    "Alcohol Amount Drug EnvironmentalExposure ExposureHistory Extent Family Frequency History "
    "InfectiousDiseases LivingSituation LivingStatus Location MaritalStatus MedicalCondition "
    "Method Occupation Other PhysicalActivity QuitHistory Residence SexualHistory Status Temporal "
    "Tobacco Type"
).split()
# The 51 labels that remain after the reference's overwriting of spans, in its order.
LABELS = (
    *(f"B-{t}" for t in TYPES if t != "LivingSituation"),
    *(f"I-{t}" for t in TYPES if t != "PhysicalActivity"),
    "O",
)
HOMEPAGE = "https://depts.washington.edu/bionlp/data/corpora/files/SocialHistoryMTSamples.zip"


def load(folder: pathlib.Path) -> Data:
    """One example per document (.txt with its .ann); 70/15/15. Other labels follow the 51."""
    skipped: Counter[str] = Counter()
    try:
        found = documents(folder, skipped)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; get Social History from {HOMEPAGE}") from None
    tagged = [tag(text, spans, BLANK_WORDS, skipped) for _, text, spans in found]
    more = {label for _, tags in tagged for label in tags} - set(LABELS)
    labels = (*LABELS, *sorted(more))
    return token_data(tagged, three_ways(len(tagged)), skipped, folder, labels)


TASK = Task(
    name="social_history",
    title="Social History: entities in social-history sections",
    kind="tokens",
    metric="f1",
    homepage=HOMEPAGE,
    load=load,
    published=published(58.5, 57.1, 53.1, 54.8, 55.2, 55.8, 55.2, 56.8, 53.3, 53.8),
)
