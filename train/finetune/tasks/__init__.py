"""The tasks of `python -m train finetune`: five of the model card, two open, your files."""

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
    """The task of that name. Raises ValueError with one line that lists all names."""
    for task in TASKS:
        if task.name == name:
            return task
    names = ", ".join(task.name for task in TASKS)
    raise ValueError(f"task: expected one of {names}, retrieval; got {name!r}")
