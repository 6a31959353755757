"""Social History: substances, occupation, living and family, in MTSamples' social-history sections.

As in the reference, words stand between blanks and an entity has those that lie wholly in it: one
whose last word carries a full stop loses that word, and one that has no other is lost (counted).
This is kept, because the published scores are measured so.
"""

import pathlib
from collections import Counter

from .brat import BLANK_WORDS, documents, tag
from .files import token_data
from .task import Data, Task, three_ways

TYPES = (
    "Alcohol Amount Drug EnvironmentalExposure ExposureHistory Extent Family Frequency History "
    "InfectiousDiseases LivingSituation LivingStatus Location MaritalStatus MedicalCondition "
    "Method Occupation Other PhysicalActivity QuitHistory Residence SexualHistory Status Temporal "
    "Tobacco Type"
).split()
# The reference's 51 labels are those that its overwriting of spans leaves over, in this order.
LABELS = (
    *(f"B-{t}" for t in TYPES if t != "LivingSituation"),
    *(f"I-{t}" for t in TYPES if t != "PhysicalActivity"),
    "O",
)
HOMEPAGE = "https://depts.washington.edu/bionlp/data/corpora/files/SocialHistoryMTSamples.zip"


def load(folder: pathlib.Path) -> Data:
    """An example a document: .txt with its .ann; 70/15/15. Labels beyond the 51 come after them."""
    skipped: Counter[str] = Counter()
    try:
        found = documents(folder, skipped)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; Social History is to be had at {HOMEPAGE}") from None
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
    published={
        "BioClinical ModernBERT base": 58.5,
        "BioClinical ModernBERT large": 57.1,
        "ModernBERT base": 53.1,
        "ModernBERT large": 54.8,
        "Bio_ClinicalBERT": 55.2,
        "BioBERT": 55.8,
        "BioMed-RoBERTa": 55.2,
        "Clinical-Longformer": 56.8,
        "Clinical-BigBird": 53.3,
        "Clinical ModernBERT": 53.8,
    },
)
