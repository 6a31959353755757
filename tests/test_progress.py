"""What long work shows in a log."""

import time

import pytest

from train.common import progress
from train.common.parallel import run_all
from train.common.progress import Progress, duration


@pytest.fixture
def quick(monkeypatch):
    """Time passes a thousand times as fast."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)


def test_a_line_also_while_nothing_advances(quick, capsys):
    seen = ""
    with Progress(total=2, desc="read") as bar:
        while seen.count("\n") < 3:
            time.sleep(0.005)
            seen += capsys.readouterr().err
        bar.update(2)
    seen += capsys.readouterr().err
    lines = [line for line in seen.split("\n") if line]
    assert "read:   0%" in lines[0] and " 0/2 " in lines[2]
    assert "100%" in lines[-1] and " 2/2 " in lines[-1]
    assert "\r" not in seen


def test_short_work_leaves_no_line(capsys):
    run_all(len, [[1], [2]], "read")
    assert not capsys.readouterr().err


def test_run_all_counts_items(quick, capsys):
    run_all(lambda item: time.sleep(0.1), [1, 2, 3], "tokenize")
    seen = capsys.readouterr().err
    assert "tokenize" in seen and "/3 " in seen


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "1 s"), (100, "100 s"), (130, "2 min"), (3_599, "60 min"), (12_000, "3 h 20 min"),
     (86_399, "24 h 0 min"), (90_000, "1 d 1 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text
