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
# # 3 · Pretrain in two phases on your own notes
#
# **At the end** you will have a masked language model trained on a folder of notes in two phases:
# first with 30 % of the tokens masked and a constant learning rate, then with 15 % and a decay to
# almost zero, as in BioClinical ModernBERT. You will have stopped and resumed the run, and plotted
# its curves.
#
# **Time:** 60 s on 2 CPU cores. Nothing is downloaded.

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

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # start from ModernBERT-base, from the hub

# %% [markdown]
# ## The notes
#
# The corpus is a folder of `.txt`, `.jsonl`, `.csv` or `.tsv` files. These notes are synthetic,
# from a generator with a seed; replace them with your own.

# %%
import json

from train.corpora.synthetic import write_corpus

NOTES = "runs/notes"
file = write_corpus(NOTES, 1_500, seed=17)
print(json.loads(file.open().readline())["text"])

# %% [markdown]
# ## The configuration
#
# A run is a dataclass, and so is each phase. The same run on the command line is `python -m train
# pretrain --config notebook --corpus runs/notes --workdir runs/mine`.

# %%
import dataclasses

from train.configs.notebook import get_config

config = dataclasses.replace(get_config(), corpus=(NOTES,), workdir="runs/mine")
if REAL:
    from modernbert_jax import ModernBertConfig

    phases = [dataclasses.replace(phase, learning_rate=1e-4) for phase in config.phases]
    config = dataclasses.replace(
        config,
        init_from="answerdotai/ModernBERT-base",  # its architecture, weights and tokenizer
        model=ModernBertConfig.base(dtype="bfloat16", attention_out_dropout=0.1),
        phases=tuple(phases),
    )

for phase in config.phases:
    print(
        f"{phase.name}: {phase.tokens:,} tokens, {phase.mlm_probability:.0%} masked, "
        f"learning rate {phase.learning_rate:g}, decay over the last {phase.decay_tokens:,}"
    )

# %% [markdown]
# ## Train, and interrupt the run
#
# Machines are preempted, usually with a SIGTERM as notice. Here a thread sends this signal in the
# middle of phase 1. The run saves a checkpoint and stops.

# %%
import signal
import threading
import time
from pathlib import Path

from train.pretrain.run import run

STEPS = sum(phase.tokens for phase in config.phases) // (
    config.global_batch_size * config.sequence_length
)


def interrupt() -> None:
    """Sends SIGTERM after a quarter of the steps; each step writes one line of metrics."""
    metrics = Path(config.workdir) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < STEPS // 4:
        time.sleep(0.05)
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # the run handles it
        os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=interrupt, daemon=True).start()
result = run(config)

# %% [markdown]
# The same call resumes the run: the weights, the optimizer's moments, the position in the data and
# the number of tokens of each phase. The tests compare such runs with uninterrupted ones, bit for
# bit.

# %%
result = run(config)

# %% [markdown]
# ## Curves
#
# `metrics.jsonl` has one line per step. The run also plots `curves.png` and writes TensorBoard
# files from the same numbers. The dashed line marks the interruption, the solid line the change of
# phase.

# %%
from matplotlib import pyplot as plt

from train.common.metrics import read_metrics

plt.rcParams["figure.dpi"] = 70

lines = read_metrics(Path(config.workdir))
steps = [line for line in lines if line["kind"] == "train"]
scores = [line for line in lines if line["kind"] == "eval"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, name in zip(axes, ("loss", "accuracy", "learning_rate"), strict=True):
    axis.plot([s["total_tokens"] / 1e3 for s in steps], [s[name] for s in steps], lw=1)
    if name != "learning_rate":
        axis.plot([s["total_tokens"] / 1e3 for s in scores], [s[name] for s in scores], "o-")
    axis.axvline(steps[STEPS // 4]["total_tokens"] / 1e3, color="grey", ls="--", lw=0.8)
    axis.axvline(config.phases[0].tokens / 1e3, color="grey", lw=0.8)
    axis.set(title=name.replace("_", " "), xlabel="thousand tokens")
axes[0].legend(["training", "evaluation"], fontsize=8)
plt.show()

# %% [markdown]
# ## How good is it?
#
# This is the masked accuracy on the evaluation set: the fraction of masked tokens that the model
# predicts correctly. The unigram baseline always predicts the most common token.

# %%
last = result["phases"][-1]
print(f"masked accuracy {last['accuracy']:.1%}, unigram baseline {last['unigram_accuracy']:.1%}")
print(f"{result['total_tokens']:,} tokens in {result['steps']} steps")

# %% [markdown]
# ## Use it
#
# The folder `export` in the workdir has Hugging Face's layout, and `transformers` loads it as well.
# The model knows the phrases of the notes, and nothing else of medicine.

# %%
from modernbert_jax import pipeline

pipe = pipeline("fill-mask", model="runs/mine/export", top_k=3)
for text in (
    "Furosemide 40 mg twice [MASK] was started for heart failure.",
    "Mr. Hartley is a 63-year-old [MASK] who was seen for leg swelling.",
    "[MASK] is a disease caused by an uncontrolled division of cells.",
):
    print(text)
    print("   ", ", ".join(f"{a['token_str'].strip()} {a['score']:.0%}" for a in pipe(text)))

# %% [markdown]
# ## Next
#
# - Train a larger model: `--config demo` (4 minutes, 72 % masked accuracy), or `--config
#   bioclinical_base` on a pod (notebook 6 plans it).
# - Fine-tune your model: pass `model="runs/mine/export"` in notebook 4.
