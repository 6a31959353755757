"""The reference page is that of the docstrings as they are."""

import pytest

from tests import make_reference

pytestmark = pytest.mark.slow


def test_the_page_is_current():
    found = make_reference.PAGE.read_text(encoding="utf-8")
    assert found == make_reference.page(), "run `make reference` and commit the page"


def test_the_page_holds_what_it_promises():
    text = make_reference.page()
    for part in (
        "### ModernBertForMaskedLM",
        ".from_pretrained(path_or_repo: str | os.PathLike[str], *, dtype",
        "max_position_embeddings: int = 8192  # tokens; training refuses longer rows",
        "- `AutoModel` is `ModernBertModel`",
        "| pretrain | masked-LM pretraining in phases; takes up a run that was interrupted |",
        "| to-composer | a masked LM to Composer's format |",
    ):
        assert part in text, part
