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
# # 10 · New words for your specialty
#
# **At the end** you will have found the words of your notes that a checkpoint's tokenizer breaks
# into pieces, made each a token of its own, and continued the pretraining until the model knows
# them, with a count and a picture of before and after.
#
# **Time:** 120 s on 2 CPU cores. Nothing is downloaded.

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

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # start from the released checkpoint, from the hub

# %% [markdown]
# ## A checkpoint that knows other words
#
# A small model, trained on the chapters of Python's language reference, with a tokenizer of their
# own: no drug and no finding is a word to it. A released checkpoint takes its place with
# `MODERNBERT_REAL`.

# %%
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from pydoc_data.topics import topics

from train import configs
from train.pretrain.run import run

START = "answerdotai/ModernBERT-base"
if not REAL:
    START = "runs/start/export"
    if not os.path.exists(START):  # notebook 7 trains the same model
        file = Path("runs/general/train.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        paragraphs = [p for text in topics.values() for p in text.split("\n\n") if len(p) > 200]
        kept = [p for i, p in enumerate(paragraphs) if i % 10]
        file.write_text("".join(json.dumps({"text": p}) + "\n" for p in kept))
        config = configs.load("notebook")
        phase = dataclasses.replace(config.phases[0], decay_tokens=150_000)
        config = dataclasses.replace(
            config, phases=(phase,), corpus=(str(file.parent),), workdir="runs/start"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run(config)

# %% [markdown]
# ## Which words break?
#
# A word is worth a token if it is frequent and has many pieces: what it saves is its count, times
# the pieces that it no longer needs. The notes are synthetic; replace the folder with your own.

# %%
import re
from collections import Counter

from modernbert_jax import AutoTokenizer
from train.corpora.synthetic import write_corpus

NOTES = "runs/words-notes"
read = lambda file: [json.loads(line)["text"] for line in file.open()]  # noqa: E731
notes = read(write_corpus(NOTES, 600, seed=17))
tokenizer = AutoTokenizer.from_pretrained(START)
counts = Counter(word for note in notes for word in re.findall(r"(?<= )[a-z]{5,}\b", note))
pieces = {word: tokenizer.tokenize(" " + word) for word in counts}
saved = {word: count * (len(pieces[word]) - 1) for word, count in counts.items()}
words = sorted(saved, key=saved.get, reverse=True)[:24]
for word in words[:8]:
    print(f"{word:16s} {counts[word]:4d} times   {' '.join(pieces[word]).replace('Ġ', '_')}")

# %% [markdown]
# ## A token for each
#
# A new token includes the space before it, like the tokenizer's own words (shown as `_`), so that
# a text decodes to itself. ModernBERT has 83 unused slots; `use_unused=True` fills them first, and
# then the model keeps its size. Our small tokenizer has none.

# %%
from modernbert_jax.tokenizer import add_tokens

old = AutoTokenizer.from_pretrained(START)
added = add_tokens(tokenizer, [" " + word for word in words], use_unused=REAL)
tokenizer.save_pretrained("runs/words-tokenizer")
before, after = (sum(len(t(note)["input_ids"]) for note in notes) for t in (old, tokenizer))
print(f"{added} tokens added; the notes have {before:,} tokens before, {after:,} after")
print(f"the same text again: {tokenizer.decode(tokenizer.encode(notes[0])[1:-1]) == notes[0]}")

# %% [markdown]
# ## What the model knows of them
#
# In notes that are not in the corpus, each new word is masked in turn: how often does the model
# put it first among all tokens? Before training this is chance: `resize_token_embeddings` gives
# each new token the mean of all embeddings.

# %%
import numpy as np
from flax import nnx

from modernbert_jax import ModernBertForMaskedLM

unseen = read(write_corpus("runs/words-unseen", 40, seed=99))
new_ids = tokenizer.convert_tokens_to_ids([" " + word for word in words])
rows, targets = [], []
for ids in tokenizer(unseen, max_length=256, truncation=True, padding="max_length")["input_ids"]:
    for place in np.flatnonzero(np.isin(ids, new_ids)):
        targets.append((place, ids[place]))
        rows.append(np.where(np.arange(256) == place, tokenizer.mask_token_id, ids))
print(f"{len(rows)} masked words in {len(unseen)} notes")


def correct(model):
    """Returns for each new word how often the model puts it first, between 0 and 1."""
    call = nnx.jit(lambda model, ids: model(ids, ids != tokenizer.pad_token_id).logits)
    hits = {i: [] for i in new_ids}
    for first in range(0, len(rows), 32):
        batch = np.stack((rows[first : first + 32] + rows[:32])[:32])  # always 32
        logits = np.asarray(call(model, batch))
        part = targets[first : first + 32]
        for one, (place, target) in zip(logits, part, strict=False):
            hits[target].append(one[place].argmax() == target)
    return np.array([np.mean(hits[i]) if hits[i] else np.nan for i in new_ids])


model = ModernBertForMaskedLM.from_pretrained(START, dtype="float32")
if len(tokenizer) > model.config.vocab_size:
    model.resize_token_embeddings(len(tokenizer))
known_before = correct(model)
print(f"new words put first: {np.nanmean(known_before):.1%}")

# %% [markdown]
# ## Continue the pretraining
#
# On the command line: `python -m train pretrain --config continue --init-from CHECKPOINT
# --tokenizer runs/words-tokenizer --corpus runs/words-notes --epochs 2`. Because the tokenizer is
# the checkpoint's with added tokens, the run extends the embedding itself, and with
# `--init-optimizer` also the moments. Notebook 7 explains the configuration.

# %%
config = configs.load("continue")
if not REAL:
    phases = tuple(dataclasses.replace(phase, learning_rate=5e-3) for phase in config.phases)
    model_config = config.model.replace(dtype="float32")
    config = dataclasses.replace(config, phases=phases, model=model_config, remat="none")
config = dataclasses.replace(
    config,
    init_from=START,
    tokenizer="runs/words-tokenizer",
    corpus=(NOTES,),
    workdir="runs/words",
    epochs=2.0,
)
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    result = run(config)
print(re.findall("vocabulary: .*", printed.getvalue())[0] if not REAL else "same vocabulary")
print(f"trained on {result['total_tokens']:,} tokens in {result['steps']} steps")

# %% [markdown]
# ## Before and after

# %%
import matplotlib.pyplot as plt

trained = ModernBertForMaskedLM.from_pretrained("runs/words/export", dtype="float32")
known_after = correct(trained)
print(f"new words put first: {np.nanmean(known_before):.1%} before, ", end="")
print(f"{np.nanmean(known_after):.1%} after")
figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
order = np.argsort(np.nan_to_num(known_after))
axis.barh([words[i] for i in order], 100 * known_after[order], color="#4269d0", label="after")
axis.plot(100 * known_before[order], range(len(order)), "k|", label="before")
axis.set(xlabel="masked, and put first by the model (%)")
axis.tick_params(axis="y", labelsize=7)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The folder loads in transformers, where the new words are tokens, too.

# %%
from modernbert_jax import pipeline

pipe = pipeline("fill-mask", model="runs/words/export", top_k=3)
for text in ("The patient [MASK] chest pain.", "Continue [MASK] 40 mg daily."):
    answers = ", ".join(f"{a['token_str'].strip()} {a['score']:.0%}" for a in pipe(text))
    print(f"{text}  {answers}")

# %% [markdown]
# ## Next
#
# - A loop of your own instead of `pretrain`: call `model.resize_token_embeddings(len(tokenizer))`
#   before you make the optimizer, whose moments have the shapes of the weights.
# - Few notes: train adapters only (`modernbert_jax.lora`), and the embedding beside them.
# - What a run forgets of general text: notebook 7 measures it.
