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
# # 9 · Semantic search over your notes
#
# **At the end** you will have turned notes into vectors, seen them in a picture, searched them,
# fine-tuned the encoder so that short vectors are enough, reranked what it finds, and scored each
# step by nDCG, beside a search that counts words.
#
# **Time:** 90 s on 2 CPU cores. Half of it trains a small model, which replaces a download.

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
MTSAMPLES = os.environ.get("MTSAMPLES_DIR", "")  # a folder with mtsamples.csv, if any
INTERVIEWS = os.environ.get("INTERVIEWS_DIR", "")  # a folder with the interviews, if any

# %% [markdown]
# ## A pretrained model
#
# This is either the released model, or three layers of width 64 that we train here on synthetic
# notes (notebook 3 shows how).

# %%
import contextlib
import io

MODEL, SCALE, LENGTH = "thomas-sounack/BioClinical-ModernBERT-base", 1, 512
if not REAL:
    # A small model needs larger learning rates. Only the first 80 tokens of a note are read.
    MODEL, SCALE, LENGTH = "runs/notebook/export", 200, 80
    if not os.path.exists(MODEL):
        from train.configs.notebook import get_config
        from train.pretrain.run import run

        with contextlib.redirect_stdout(io.StringIO()):
            run(get_config())

# %% [markdown]
# ## Notes, and queries for them
#
# Training for search needs texts and the queries that should find them. Such pairs are often in the
# records already: here a note and its reason for the visit. MTSamples has a description of each
# note (kaggle.com/datasets/tboyle10/medicaltranscriptions), and an interview begins with what the
# patient complains of (doi.org/10.6084/m9.figshare.16550013). Set MTSAMPLES_DIR or INTERVIEWS_DIR
# to read them. A query should then find its own note.
#
# Without them, the notes are synthetic, and a query should find every note with its diagnosis. The
# queries to train on name one symptom, those of the evaluation name two.

# %%
import csv
import random
from pathlib import Path
from typing import NamedTuple

from train.corpora.source import Report
from train.corpora.sources import respiratory_interviews
from train.corpora.synthetic import DIAGNOSES, synthetic_notes


class Note(NamedTuple):
    """A note. topic: the notes that a query should find have the same one. group: its color."""

    text: str
    query: str
    topic: str
    group: str


def synthetic(count: int, seed: int, reasons: tuple[str, ...]) -> list[Note]:
    """Generates notes. reasons: forms of a query, in which {0} and {1} are symptoms."""
    draw, notes = random.Random(seed), []
    for text in synthetic_notes(count, seed):
        diagnosis = next(d for d in DIAGNOSES if d.name in text)
        query = draw.choice(reasons).format(*draw.sample(diagnosis.symptoms, 3))
        notes.append(Note(text, query, diagnosis.name, diagnosis.service))
    return notes


def mtsamples(folder: str) -> list[Note]:
    """Reads the distinct transcriptions of mtsamples.csv that have a description."""
    with open(Path(folder) / "mtsamples.csv", encoding="utf-8", newline="") as file:
        rows = {row["transcription"].strip(): row for row in csv.DictReader(file)}
    return [
        Note(text, row["description"].strip(), text, row["medical_specialty"].strip())
        for text, row in rows.items()
        if text and row["description"].strip()
    ]


def interviews(folder: str) -> list[Note]:
    """Reads the interviews. The query is the patient's first answer of at least six words."""
    notes, root, source = [], Path(folder), respiratory_interviews.SOURCE
    for part in source.parts(root):
        for example in source.read(part, root, Report()):
            turns = example.text.splitlines()
            said = [t[2:].strip() for t in turns if t.startswith("P:") and len(t.split()) > 6]
            if said:
                text = example.text.replace(said[0], "", 1)
                notes.append(Note(text, said[0], text, example.meta["specialty"]))
    return notes


if MTSAMPLES or INTERVIEWS:
    notes = mtsamples(MTSAMPLES) if MTSAMPLES else []
    notes += interviews(INTERVIEWS) if INTERVIEWS else []
    random.Random(0).shuffle(notes)
    training, corpus = notes[256:], notes[:256]
else:
    reasons = ("{0} for three days", "new {0}", "{0} since last week", "worse {0}")
    training, corpus = synthetic(640, 29, reasons), synthetic(256, 23, ("{0} and {1}",))
topic_of = {note.query: note.topic for note in corpus}
queries = list(topic_of)[:64]
print(f"{len(training)} notes to train on; {len(queries)} queries to {len(corpus)} others")
print(f"trained on:  {training[0].query}\nevaluated on:  {queries[0]}")

# %% [markdown]
# ## Vectors
#
# `Embedder` packs the notes into full sequences. With `output_value=None` it returns the vector of
# each text and those of its tokens, which we need at the end.

# %%
import numpy as np

from modernbert_jax import Embedder


class Search:
    """The vectors of the corpus and of the queries, by one model."""

    def __init__(self, model: str):
        self.embedder = Embedder.from_pretrained(model, max_length=LENGTH)
        self.notes, self.note_tokens = self.encode([note.text for note in corpus])
        self.queries, self.query_tokens = self.encode(queries)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns vectors [texts, D] of length 1, and those of the tokens of each text."""
        found = self.embedder.encode(texts, output_value=None)
        return (
            np.stack([one["sentence_embedding"] for one in found]),
            [one["token_embeddings"] for one in found],
        )


before = Search(MODEL)
print("notes", before.notes.shape, "queries", before.queries.shape)

# %% [markdown]
# ## Scores
#
# nDCG@10 looks at the first ten notes: 1 if they are the right ones, less if wrong ones stand above
# them. The search to beat counts words: BM25, over the same tokens of the notes. Mean vectors of a
# model that has only filled masks are no better than chance here.

# %%
import re

from train.finetune.retrieval.scores import ranking_scores

relevant = [
    {i: 1.0 for i, note in enumerate(corpus) if note.topic == topic_of[query]} for query in queries
]


def ndcg(scores_QN: np.ndarray) -> float:
    """Returns the mean nDCG@10 of a score for each query and note."""
    return ranking_scores([scores_QN], relevant)["ndcg@10"]


def bm25(texts: list[str], k: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Returns the BM25 scores of all texts for each query."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    length = np.array([len(w) for w in words])
    scores_QN = np.zeros((len(queries), len(texts)))
    for scores_N, query in zip(scores_QN, queries, strict=True):
        for word in re.findall(r"\w+", query.lower()):
            count = np.array([w.count(word) for w in words])
            rare = np.log(1 + (len(texts) - (count > 0).sum() + 0.5) / ((count > 0).sum() + 0.5))
            scores_N += rare * count * (k + 1) / (count + k * (1 - b + b * length / length.mean()))
    return scores_QN


tokenizer = before.embedder.tokenizer
ids = tokenizer([note.text for note in corpus], truncation=True, max_length=LENGTH)["input_ids"]
read = tokenizer.batch_decode(ids, skip_special_tokens=True)  # the part that the model reads
words_QN = bm25(read)
chance = np.random.default_rng(0).random(words_QN.shape)
print(f"chance: nDCG@10 {ndcg(chance):.3f}")
print(f"counted words: nDCG@10 {ndcg(words_QN):.3f}")
print(f"pretrained encoder: nDCG@10 {ndcg(before.queries @ before.notes.T):.3f}")

# %% [markdown]
# ## Fine-tune for search
#
# On the command line: `python -m train finetune --task retrieval --data runs/search_data --model
# CHECKPOINT --matryoshka-dims 64 32 16 8`, and so on. Each query is pulled to its note, and away
# from the other notes of the batch. The loss is added up over vectors cut to each of these
# dimensions, so that the first numbers of a vector are a vector of their own. The folder is in
# BEIR's layout, and the run scores itself before and after.

# %%
import json

from train.finetune.retrieval import RetrievalConfig, train

DATA = Path("runs/search_data")
DATA.mkdir(parents=True, exist_ok=True)


def write(name: str, records: list[dict[str, str]]) -> None:
    """Writes a line of JSON for each record."""
    (DATA / name).write_text("".join(json.dumps(record) + "\n" for record in records))


write("train.jsonl", [{"query": note.query, "positive": note.text} for note in training])
write("corpus.jsonl", [{"_id": f"n{i}", "text": note.text} for i, note in enumerate(corpus)])
write("queries.jsonl", [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)])
lines = [f"q{i}\tn{j}\t1\n" for i, found in enumerate(relevant) for j in found]
(DATA / "qrels.tsv").write_text("".join(lines))

width = before.notes.shape[1]
DIMS = tuple(width // n for n in (1, 2, 4, 8))
with contextlib.redirect_stdout(io.StringIO()):
    result = train(
        RetrievalConfig(
            data=str(DATA),
            model=MODEL,
            out="runs/search",
            matryoshka_dims=DIMS,
            learning_rate=2e-5 * SCALE,
            epochs=1 if REAL else 10,
            batch_size=32,
            chunk=8 if REAL else 64,  # texts in a forward pass; all of a batch are compared
            max_length=LENGTH,
        )
    )
print("dimension  bytes a note  nDCG@10 before  after")
for dim in DIMS:
    name = "ndcg@10" if dim == width else f"dim_{dim}_ndcg@10"
    print(f"{dim:9} {4 * dim:13} {result['before'][name]:15.3f} {result['after'][name]:6.3f}")

# %% [markdown]
# The numbers are those of a tiny model on notes from templates. They show that the parts work, and
# that a quarter of the numbers of a vector is almost as good as all, but nothing about your notes.
#
# This picture shows the corpus in the plane in which its vectors differ most (PCA), before and
# after. A color is a service, or a specialty; grey points are all others.

# %%
from collections import Counter

from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

after = Search("runs/search/model")
common = [group for group, _ in Counter(note.group for note in corpus).most_common(6)]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained")
for axis, search, title in zip(axes, (before, after), ("before", "after"), strict=False):
    centered = search.notes - search.notes.mean(0)
    points = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    for group in (None, *common):
        where = [(note.group if note.group in common else None) == group for note in corpus]
        color = "lightgrey" if group is None else None
        axis.scatter(*points[where].T, s=9, color=color, label=group or "others")
    axis.set(title=f"notes, {title}", xticks=[], yticks=[])
axes[0].legend(fontsize=7)
for when in ("before", "after"):
    names = ["ndcg@10" if dim == width else f"dim_{dim}_ndcg@10" for dim in DIMS]
    axes[2].plot(DIMS, [result[when][name] for name in names], "o-", label=when)
axes[2].axhline(ndcg(words_QN), color="grey", ls=":", label="counted words")
axes[2].set(xscale="log", xlabel="numbers in a vector", title="nDCG@10", ylim=(0, 1))
axes[2].set_xticks(DIMS, DIMS)
axes[2].minorticks_off()
axes[2].legend(fontsize=7)
plt.show()

# %% [markdown]
# ## Search
#
# The best three notes for a query, and whether they contain a word of it. (Do not publish such
# output from your own notes.)

# %%
scores_QN = after.queries @ after.notes.T
for query, scores_N, words_N in list(zip(queries, scores_QN, words_QN, strict=True))[:3]:
    print(query)
    for i in np.argsort(-scores_N)[:3]:
        topic = " ".join(corpus[i].topic.split())[:40]
        right = "right" if corpus[i].topic == topic_of[query] else "wrong"
        print(f"    {scores_N[i]:.2f} {right}, {'words' if words_N[i] else 'no word':7} {topic}")

# %% [markdown]
# Does it find what counting words does not? These are the right notes among the first ten of both.

# %%
hits = [
    {(q, int(i)) for q, scores_N in enumerate(one) for i in np.argsort(-scores_N)[:10]}
    & {(q, i) for q, found in enumerate(relevant) for i in found}
    for one in (scores_QN, words_QN)
]
print(f"right notes in the first ten: {len(hits[0])} by vectors, {len(hits[1])} by words")
print(f"by vectors only: {len(hits[0] - hits[1])}, by words only: {len(hits[1] - hits[0])}")

# %% [markdown]
# ## Rerank
#
# One vector per text is fast and coarse, so a second step looks at the first twenty notes again.
# Here it is MaxSim, as in ColBERT: how well the tokens of the query match their best token in the
# note, on average. Its score is added to that of the vectors.


# %%
def max_sim(query_LD: np.ndarray, note_MD: np.ndarray) -> float:
    """Returns the mean over a query's tokens of the best cosine with a note's, without [CLS]."""
    unit = [x[1:-1] / np.linalg.norm(x[1:-1], axis=1, keepdims=True) for x in (query_LD, note_MD)]
    return float((unit[0] @ unit[1].T).max(1).mean())


reranked_QN = scores_QN - 2  # below those that are read again
for q, tokens in enumerate(after.query_tokens):
    for i in np.argsort(-scores_QN[q])[:20]:
        reranked_QN[q, i] = scores_QN[q, i] + max_sim(tokens, after.note_tokens[i])
for name, values_QN in (
    ("pretrained encoder", before.queries @ before.notes.T),
    ("counted words", words_QN),
    ("fine-tuned encoder", scores_QN),
    ("reranked by MaxSim", reranked_QN),
):
    print(f"{name:20} nDCG@10 {ndcg(values_QN):.3f}")

# %% [markdown]
# ## Use it
#
# The folder `runs/search/model` loads in `sentence-transformers` as well. `truncate_dim` keeps the
# first numbers, and `precision="int8"` would store each in a byte.

# %%
short = after.embedder.encode(queries[:1], truncate_dim=DIMS[2], normalize_embeddings=True)
print(short.shape, short.dtype)

# %% [markdown]
# ## Next
#
# - Hard negatives, teachers, and models with a vector per token (`--multi-vector`, which trains
#   what MaxSim compares): the guide [retrieval](guides/retrieval.md).
# - A cross-encoder reads the query and a note together: `Reranker.from_pretrained(path).rank(query,
#   notes)`.
# - `modernbert-jax serve runs/search/model` answers `/v1/embeddings`: the guide
#   [serving](guides/serving.md).
