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


RETRIEVAL = (
    "Search: a bi-encoder from pairs of texts",
    "train.jsonl, and for scores queries.jsonl, corpus.jsonl and qrels.tsv",
    '{"query": "chest pain", "positive": "The patient reports pain in the chest."}',
)


def described() -> str:
    """The tasks in lines for --help: those of your own files with a row of each file."""
    lines = ["Tasks with your own files, each a folder with train and test, or one file to split:"]
    own = [(t.name, t.title, t.files, t.example) for t in TASKS if t.files]
    for name, title, form, example in (*own, ("retrieval", *RETRIEVAL)):
        lines += ["", f"  {name:<16}{title}", f"  {'':<16}{form}", f"  {'':<16}{example}"]
    lines += ["", "Tasks with published files, a folder as downloaded:", ""]
    lines += [f"  {task.name:<16}{task.title}" for task in TASKS if not task.files]
    return "\n".join(lines)


def task_named(name: str) -> Task:
    """The task of that name. Raises ValueError with one line that lists all names."""
    for task in TASKS:
        if task.name == name:
            return task
    names = ", ".join(task.name for task in TASKS)
    raise ValueError(f"task: expected one of {names}, retrieval; got {name!r}")
