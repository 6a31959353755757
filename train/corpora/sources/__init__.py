"""The sources of text: the published corpora as their owners distribute them, and local files."""

from ...common.settings import check_set
from ..source import Source
from .generic import generic

GENERIC = ("text", "jsonl", "csv", "huggingface")


def sources() -> tuple[Source, ...]:
    """The 22 corpora of BioClinical ModernBERT, the biomedical first, then the generic ones."""
    # Imported here, since programs that only read token files do not need them.
    from . import (
        aci_bench,
        ade_corpus,
        brain_mri_stroke,
        chexpert_plus,
        chifir,
        coral,
        eye_gaze_cxr,
        gout,
        id68,
        inspect,
        mednli,
        medqa,
        mimic3,
        mimic4_note,
        mtsamples,
        negex,
        pmc,
        primock57,
        pubmed,
        qpain,
        reflacx,
        respiratory_interviews,
    )

    clinical = (
        aci_bench, ade_corpus, brain_mri_stroke, chexpert_plus, chifir, coral, eye_gaze_cxr, gout,
        id68, inspect, mednli, medqa, mimic3, mimic4_note, mtsamples, negex, primock57, qpain,
        reflacx, respiratory_interviews,
    )  # fmt: skip
    return (
        pubmed.SOURCE,
        pmc.SOURCE,
        *(module.SOURCE for module in clinical),
        *(generic(name) for name in GENERIC),
    )


def transcripts() -> tuple[Source, ...]:
    """The transcripts of two of them, which the model card does not count."""
    from . import aci_bench, primock57

    return aci_bench.DIALOGUE, primock57.DIALOGUE


def find(name: str, text_column: str | None = None) -> Source:
    """Finds a source by name. Raises ValueError for an unknown name or an unused text_column."""
    check_set(text_column=text_column)
    from . import brain_mri_stroke

    if name in GENERIC:
        return generic(name, text_column)
    found = {source.name: source for source in (*sources(), *transcripts())}
    if name not in found:
        raise ValueError(f"corpus: expected all or one of {', '.join(found)}; got {name!r}")
    if text_column is not None and name == "brain_mri_stroke":
        return brain_mri_stroke.with_column(text_column)
    if text_column is not None:
        raise ValueError(
            f"text_column: {name} has its own; expected it only with {', '.join(GENERIC)}"
        )
    return found[name]
