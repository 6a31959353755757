"""The reference page agrees with the docstrings."""

import pytest

from tests import make_reference

pytestmark = pytest.mark.slow


def test_the_page_is_current():
    found = make_reference.PAGE.read_text(encoding="utf-8")
    assert found == make_reference.page(), "run `make reference` and commit the page"


def test_the_page_has_every_section():
    text = make_reference.page()
    for part in (
        "### ModernBertForMaskedLM",
        ".from_pretrained(path_or_repo: str | os.PathLike[str], *, dtype",
        "max_position_embeddings: int = 8192  # tokens; training refuses longer sequences",
        "- `AutoModel` is `ModernBertModel`",
        "| pretrain | Masked-LM pretraining in phases; resumes an interrupted run. |",
        "| to-composer | Converts a masked LM (SRC: ",
    ):
        assert part in text, part
