"""The tasks of `python -m train finetune`: the card's five, two on open data, your own."""

from . import (
    chemprot,
    cos,
    deid,
    files,
    negex,
    phenotype,
    questions,
    social_history,
    specialty,
)
from .task import Task

TASKS: tuple[Task, ...] = (
    chemprot.TASK,
    phenotype.TASK,
    cos.TASK,
    social_history.TASK,
    deid.TASK,
    negex.TASK,
    specialty.TASK,
    files.CLASSIFICATION,
    files.MULTILABEL,
    files.TOKENS,
    questions.TASK,
)


def task_named(name: str) -> Task:
    """The task of that name. Raises ValueError with one line that lists all."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"expected a task of {', '.join(t.name for t in TASKS)}; got {name!r}")
