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
# **At the end** you have a masked language model trained on a folder of notes, first with 30 % of
# the tokens masked at a constant rate, then with 15 % and a decay to zero, as BioClinical
# ModernBERT was; you have seen the run killed and taken up again, and its curves.
#
# **Time:** 60 s on 2 CPU cores. Nothing is downloaded.

# %%
import importlib.util
import os
import subprocess
import sys

SOURCE = "..."  # git+https://... or the URL of a wheel; not needed where the package is installed
if importlib.util.find_spec("modernbert_jax") is None:
    package = f"modernbert_jax[train,notebooks] @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
if importlib.util.find_spec("train") is None:  # a wheel holds it inside the package
    import modernbert_jax

    sys.path.append(modernbert_jax.__path__[0])

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # go on from ModernBERT-base, from the hub

# %% [markdown]
# ## The notes
#
# A folder of `.txt`, `.jsonl`, `.csv` or `.tsv`. Put yours in place of these, which a seeded
# generator makes up.

# %%
import json

from train.corpora.synthetic import write_corpus

NOTES = "runs/notes"
file = write_corpus(NOTES, 1_500, seed=17)
print(json.loads(file.open().readline())["text"])

# %% [markdown]
# ## The run, as data
#
# A run is a dataclass, and a phase is one too. On the command line, the same: `python -m train
# pretrain --config notebook --corpus runs/notes --workdir runs/mine`.

# %%
import dataclasses

from train.configs.notebook import get_config

config = dataclasses.replace(get_config(), corpus=(NOTES,), workdir="runs/mine")
if REAL:
    from modernbert_jax import ModernBertConfig

    gentle = [dataclasses.replace(phase, learning_rate=1e-4) for phase in config.phases]
    config = dataclasses.replace(
        config,
        init_from="answerdotai/ModernBERT-base",  # its architecture, weights and tokenizer
        model=ModernBertConfig.base(dtype="bfloat16", attention_out_dropout=0.1),
        phases=tuple(gentle),
    )

for phase in config.phases:
    print(
        f"{phase.name}: {phase.tokens:,} tokens, {phase.mlm_probability:.0%} masked, "
        f"rate {phase.learning_rate:g}, decay over the last {phase.decay_tokens:,}"
    )

# %% [markdown]
# ## Train, and pull the plug
#
# Machines are taken away, with a SIGTERM first where one is lucky. Here a thread sends it in the
# middle of phase 1. The run saves what it has and leaves.

# %%
import signal
import threading
import time
from pathlib import Path

from train.pretrain.run import run

STEPS = sum(phase.tokens for phase in config.phases) // (
    config.global_batch_size * config.sequence_length
)


def pull_the_plug() -> None:
    """Sends SIGTERM after a quarter of the steps; each writes a line of metrics."""
    metrics = Path(config.workdir) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < STEPS // 4:
        time.sleep(0.05)
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # the run listens
        os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=pull_the_plug, daemon=True).start()
result = run(config)

# %% [markdown]
# The same call goes on where it stopped: the weights, the optimizer's moments, the place in the
# notes and each phase's clock of tokens. The tests compare such runs with uninterrupted ones, bit
# for bit.

# %%
result = run(config)

# %% [markdown]
# ## Curves
#
# `metrics.jsonl` has a line for each step; the run draws `curves.png` and writes TensorBoard files
# from the same numbers. The dashed line is the stop above, the solid one the change of phase.

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
axes[0].legend(["training", "held out"], fontsize=8)
plt.show()

# %% [markdown]
# ## Is it any good?
#
# Share of the masked tokens of held-out notes that it guesses, beside that of always guessing the
# commonest one.

# %%
last = result["phases"][-1]
print(f"guessed {last['accuracy']:.1%}; the commonest token {last['unigram_accuracy']:.1%}")
print(f"{result['total_tokens']:,} tokens in {result['steps']} steps")

# %% [markdown]
# ## Use it
#
# `export` in the workdir is in Hugging Face's layout: it loads here and in `transformers`. The
# phrases of the notes are in it; the rest of medicine is not.

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
# - More of everything: `--config demo` (4 minutes, 72 % of the masked tokens), or `--config
#   bioclinical_base` on a pod (notebook 6 plans it).
# - Fine-tune what came out: notebook 4 takes `model="runs/mine/export"`.
