# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Fine-tune a classifier of negation
#
# **At the end** you will have a classifier that decides whether a sentence affirms or negates a
# condition (the NegEx task), with its confusion matrix and its errors one by one, and a drug tagger
# that reads notes longer than the model.
#
# **Time:** 75 s on 2 CPU cores. Half of it trains a small model, which replaces a download.

# %%
import importlib.util
import os
import subprocess
import sys

SOURCE = "..."  # git+https://... or the URL of a wheel, unless the package is installed
if importlib.util.find_spec("modernbert_jax") is None:
    package = f"modernbert_jax[train,notebooks] @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
if importlib.util.find_spec("train") is None:  # a wheel holds it inside the package
    import modernbert_jax

    sys.path.append(modernbert_jax.__path__[0])

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # use the released checkpoint, from the hub
NEGEX = os.environ.get("NEGEX_DIR", "")  # a folder with rsAnnotations-1-120-random.txt, if any

# %% [markdown]
# ## A pretrained model
#
# This is either the released model, or three layers of width 64 that we train here on synthetic
# notes (notebook 3 shows how).

# %%
import contextlib
import io

MODEL, SCALE = "thomas-sounack/BioClinical-ModernBERT-base", 1
if not REAL:
    MODEL, SCALE = "runs/notebook/export", 100  # a small model needs larger learning rates
    if not os.path.exists(MODEL):
        from train.configs.notebook import get_config
        from train.pretrain.run import run

        with contextlib.redirect_stdout(io.StringIO()):
            run(get_config())

# %% [markdown]
# ## The sentences
#
# The NegEx file is free to download (github.com/chapmanbe/negex); set NEGEX_DIR to its folder.
# Without it, we generate sentences in the same layout: with one condition, or with two of which one
# is negated, and a few where "no" negates something else.

# %%
import random
from pathlib import Path

from train.corpora.synthetic import DIAGNOSES

CONDITIONS = sorted({symptom for diagnosis in DIAGNOSES for symptom in diagnosis.symptoms})
AFFIRMED, NEGATED = "Affirmed", "Negated"
ONE = (
    ("The patient has {0}.", AFFIRMED),
    ("She came in with {0} for two days.", AFFIRMED),
    ("Examination showed {0}.", AFFIRMED),
    ("No change in {0} since the last visit.", AFFIRMED),  # "no" negates the change
    ("He denies {0}.", NEGATED),
    ("There is no {0} today.", NEGATED),
    ("Negative for {0}.", NEGATED),
    ("The {0} has resolved.", NEGATED),
)
TWO = (
    ("He has {0} without {1}.", AFFIRMED, NEGATED),
    ("No {0}, but {1} is worse.", NEGATED, AFFIRMED),
    ("She denies {0} and reports {1}.", NEGATED, AFFIRMED),
)


def write_negex(folder: str, sentences: int, seed: int) -> None:
    """Writes sentences in the layout of the NegEx file, one line for each condition to classify."""
    draw, lines = random.Random(seed), ["number\tCondition\tsentence\tstatus\ttemporality\texp"]
    for _ in range(sentences):
        template, *answers = draw.choice(ONE if draw.random() < 0.85 else TWO)
        conditions = draw.sample(CONDITIONS, len(answers))
        text = template.format(*conditions)
        for condition, answer in zip(conditions, answers, strict=True):
            lines.append(f"{len(lines)}\t{condition}\t{text}\t{answer}\tRecent\tPatient")
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "rsAnnotations-1-120-random.txt").write_text("\n".join(lines) + "\n")


if not NEGEX:
    NEGEX = "runs/negex_data"
    write_negex(NEGEX, sentences=1_000, seed=0)

# %% [markdown]
# The harness reads the file and splits it 70/15/15, with no sentence in two splits. Each example is
# a pair: the sentence and the condition.

# %%
from train.finetune.tasks import task_named

data = task_named("negex").load(Path(NEGEX))
print(len(data.train), len(data.validation), len(data.test), "examples")
for example in data.test[:3]:
    print(f"{data.labels[example.label]:9} {example.text_pair!r} in {example.text!r}")

# %% [markdown]
# ## Train
#
# This is the same as `python -m train finetune --task negex`, whose flags are the fields below.
# Short sentences are packed into full sequences. The epoch with the best validation score is kept.

# %%
import warnings

from train.finetune.run import FinetuneConfig, finetune


def scores_of(config: FinetuneConfig) -> dict[str, float]:
    """Fine-tunes and returns the scores on the test split, without printing the table."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights of the head are new
        point = finetune(config)["points"][0]
    return {name: score["mean"] for name, score in point["test"].items()}


scores = scores_of(
    FinetuneConfig(
        task="negex",
        data=NEGEX,
        model=MODEL,
        out="runs/negex",
        seeds=(42,),
        learning_rate=2e-5 * SCALE,
        epochs=6,
        batch_size=32,
    )
)
print(f"test: accuracy {scores['accuracy']:.1%}, weighted F1 {scores['weighted_f1']:.1%}")

# %% [markdown]
# ## Use it
#
# The folder `runs/negex/model` has Hugging Face's layout and contains the names of the labels.

# %%
from modernbert_jax import pipeline

pipe = pipeline("text-classification", model="runs/negex/model")
sentence = "He has fever without productive cough."
for condition in ("fever", "productive cough"):
    print(condition, pipe({"text": sentence, "text_pair": condition}))

# %% [markdown]
# ## Look at the errors
#
# Which predictions are wrong, and what do they have in common? The small model has learned the
# words of negation, but not which condition they belong to: if a sentence names two conditions, it
# is no better than chance. A model with more layers and more pretraining learns this.

# %%
import numpy as np
from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

answers = pipe([{"text": e.text, "text_pair": e.text_pair or ""} for e in data.test])
predictions = [data.labels.index(answer["label"]) for answer in answers]
truth = [example.label for example in data.test]
names = [data.labels[i] for i in sorted({*truth, *predictions})]
confusion = np.zeros((len(names), len(names)), int)
for t, p in zip(truth, predictions, strict=True):
    confusion[names.index(data.labels[t]), names.index(data.labels[p])] += 1

texts = [example.text for example in data.test]
groups = {"one condition": [], "two conditions": []}
for text, t, p in zip(texts, truth, predictions, strict=True):
    groups["two conditions" if texts.count(text) > 1 else "one condition"].append(t == p)

figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
axes[0].imshow(confusion, cmap="Blues", vmax=2 * confusion.max())
for (row, column), count in np.ndenumerate(confusion):
    axes[0].text(column, row, str(count), ha="center", va="center")
axes[0].set_xticks(range(len(names)), names)
axes[0].set_yticks(range(len(names)), names)
axes[0].set(xlabel="predicted label", ylabel="true label")
axes[1].bar(list(groups), [np.mean(correct) for correct in groups.values()], width=0.5)
axes[1].axhline(0.5, color="grey", ls=":")
axes[1].set(ylim=(0, 1.05), title="accuracy by sentence; dotted: chance")
plt.show()

# %% [markdown]
# These are the errors, the most confident first. (Do not publish such output from your own notes.)

# %%
wrong = [i for i in range(len(truth)) if truth[i] != predictions[i]]
for i in sorted(wrong, key=lambda i: -answers[i]["score"])[:6]:
    example = data.test[i]
    print(f"{answers[i]['score']:.2f} for {answers[i]['label']}: {example.text_pair!r}")
    print(f"     {example.text}")
print(f"{len(wrong)} of {len(truth)} are wrong")

# %% [markdown]
# ## Tags, in notes longer than the model
#
# A token task works in the same way, from a file of words and tags. Here the model learns to tag
# the drugs in synthetic notes.

# %%
import json

from train.corpora.synthetic import synthetic_notes

DRUGS = {drug.name.lower() for diagnosis in DIAGNOSES for drug in diagnosis.drugs}


def tags(words: list[str]) -> list[str]:
    """Returns B-DRUG for the name of a drug and O for other words."""
    return ["B-DRUG" if word.strip(".,").lower() in DRUGS else "O" for word in words]


notes = [note.split() for note in synthetic_notes(160, seed=5)]
lines = [json.dumps({"words": words, "labels": tags(words)}) for words in notes]
Path("runs/drugs.jsonl").write_text("\n".join(lines) + "\n")
scores = scores_of(
    FinetuneConfig(
        task="tokens",
        data="runs/drugs.jsonl",
        model=MODEL,
        out="runs/drugs",
        seeds=(42,),
        learning_rate=5e-5 * SCALE,
        epochs=3,
        batch_size=8,
    )
)
print(f"test: F1 of whole entities {scores['f1']:.1%}")

# %% [markdown]
# Now we tag a text of twenty notes. The pipeline slides overlapping windows over it, takes the
# prediction for each token from the window with the most context, and returns offsets in the
# original text.

# %%
tagger = pipeline("token-classification", model="runs/drugs/model", aggregation_strategy="first")
text = "\n\n".join(synthetic_notes(20, seed=6))
length = len(tagger.tokenizer(text)["input_ids"])
print(f"{length:,} tokens; the model reads {tagger.model.config.max_position_embeddings:,}")

found = tagger(text)
for entity in found[:3] + found[-2:]:
    start, end = entity["start"], entity["end"]
    print(f"{start:6}-{end:<6} {text[start:end].strip():20} {text[end : end + 30]!r}")

expected = sum(tag != "O" for tag in tags(text.split()))
print(f"{len(found)} found; the text contains {expected}")

# %% [markdown]
# ## Next
#
# - `--seeds 42 43 44 45 46 --grid learning_rate=1e-5,2e-5` reports means and standard deviations,
#   and `--backend torch` runs any `transformers` model through the same harness.
# - chemprot, phenotype, cos, social_history and deid are the tasks of the model card.
#   classification (of texts or pairs), multilabel, tokens and qa read your own files.
