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
# # 7 · Continue pretraining on your own notes
#
# **At the end** you will have continued the pretraining of a checkpoint on a folder of notes, seen
# what it knew of them before and after, what it forgot, and filled masks with the result.
#
# **Time:** 80 s on 2 CPU cores. Nothing is downloaded.

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
# ## General text
#
# A released checkpoint has read the web. Our small one reads what every Python has: the chapters of
# its language reference, as `help()` shows them. A tenth is put aside, to see later what the model
# forgets.

# %%
import json
from pathlib import Path
from pydoc_data.topics import topics

paragraphs = [p for text in topics.values() for p in text.split("\n\n") if len(p) > 200]
for name, part in (
    ("general/train", [p for i, p in enumerate(paragraphs) if i % 10]),
    ("general-evaluation/text", paragraphs[::10]),
):
    file = Path(f"runs/{name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    print(f"{file}: {len(part)} paragraphs")

# %% [markdown]
# ## A checkpoint
#
# Three layers of width 64, trained on that text, with a tokenizer of their own. Notebook 3 explains
# this run. A released checkpoint takes its place with `MODERNBERT_REAL`.

# %%
import contextlib
import dataclasses
import io

from train import configs
from train.pretrain.run import run

START = "thomas-sounack/BioClinical-ModernBERT-base"
if not REAL:
    START = "runs/start/export"
    config = configs.load("notebook")
    phase = dataclasses.replace(config.phases[0], decay_tokens=150_000)  # one phase is enough
    config = dataclasses.replace(
        config, phases=(phase,), corpus=("runs/general",), workdir="runs/start"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        result = run(config)
    print(f"trained on {result['total_tokens']:,} tokens in {result['steps']} steps")

# %% [markdown]
# ## Your notes
#
# A folder of .txt, .jsonl, .csv, .tsv or .parquet files. These notes are synthetic; replace the
# folder with your own, from which you have removed what identifies a person: a model can repeat
# rare words of its training text.

# %%
from train.corpora.synthetic import write_corpus

NOTES = "runs/notes"
file = write_corpus(NOTES, 400, seed=17)
print(json.loads(file.open().readline())["text"])

# %% [markdown]
# ## Continue
#
# On the command line this is `python -m train pretrain --config continue --init-from CHECKPOINT
# --corpus runs/notes --workdir runs/own --epochs 2 --general-text runs/general-evaluation`. The
# configuration derives the rest: the sequences are as long as the longest note needs, and the size
# of a step gives a small corpus enough steps. Its peak learning rate of 1e-4 is for 150 million
# parameters; a small model needs a larger one.
#
# The run scores the checkpoint before its first step, prints its plan, and reports the remaining
# time after ten steps.

# %%
config = configs.load("continue")
if not REAL:
    phases = tuple(dataclasses.replace(phase, learning_rate=5e-3) for phase in config.phases)
    model = config.model.replace(dtype="float32")
    config = dataclasses.replace(config, phases=phases, model=model, remat="none")
config = dataclasses.replace(
    config,
    init_from=START,
    corpus=(NOTES,),
    workdir="runs/own",
    epochs=2.0,
    general_text="runs/general-evaluation",
)
result = run(config)

# %% [markdown]
# ## Before and after
#
# The table above has the masked accuracy and the perplexity of each evaluation set. The run draws
# the same numbers as bars. The last row is the price: text of the kind that the checkpoint knew.
# A lower learning rate or a share of general text in the corpus reduces it.

# %%
from IPython.display import Image

Image("runs/own/before_after.png", width=700)

# %% [markdown]
# The gain has to beat a trivial one: always predicting the commonest token of the notes.

# %%
last = result["phases"][-1]
before, after = last["before"]["accuracy"], last["accuracy"]
print(f"masked accuracy on the notes: {before:.1%} before, {after:.1%} after")
print(f"commonest token: {last['unigram_accuracy']:.1%}")
general = result["general"]
print(f"general text: {general['before']['accuracy']:.1%} before, {general['accuracy']:.1%} after")

# %% [markdown]
# ## Use it
#
# The folder `export` has Hugging Face's layout, with the tokenizer and a model card. It loads here,
# in `transformers` and in `sentence-transformers`.

# %%
from modernbert_jax import pipeline

for folder in (START, "runs/own/export"):
    pipe = pipeline("fill-mask", model=folder, top_k=3)
    print(folder)
    for text in ("Furosemide 40 mg twice [MASK] was started.", "The patient [MASK] chest pain."):
        answers = ", ".join(f"{a['token_str'].strip()} {a['score']:.0%}" for a in pipe(text))
        print(f"    {text}  {answers}")

# %% [markdown]
# ## Next
#
# - More epochs: the same call with `epochs=4.0, extend=True` starts again from the last checkpoint
#   before the learning rate decayed, which the run has kept.
# - Fine-tune your model: pass `model="runs/own/export"` in notebook 4.
# - Several GPUs, offline machines, and which checkpoint to start from: the guide
#   [own_notes](guides/own_notes.md).
