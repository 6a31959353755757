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
# # 6 · Plan a pod run
#
# **At the end** you know, for TPU slices that you do not have yet, whether a run fits into their
# memory, what it exchanges, how many hours it takes and what it costs at your price.
#
# **Time:** 5 s on 2 CPU cores; some minutes more if you compile a plan of your own. No TPU is
# needed.

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

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # compile the plan below instead of reading it

# %% [markdown]
# ## The run
#
# BioClinical ModernBERT, base: 160 billion tokens of PubMed, PMC and clinical text, then 8 billion
# of clinical text alone, in rows of 8,192 tokens.

# %%
from train import configs

TOPOLOGY = "v5e:4x4"  # 16 chips
config = configs.load("bioclinical_base")
for phase in config.phases:
    print(
        f"{phase.name:16} {phase.tokens / 1e9:6.1f} billion tokens, "
        f"{phase.mlm_probability:.0%} masked"
    )
print(f"a step: {config.global_batch_size} rows of {config.sequence_length:,} tokens")

# %% [markdown]
# ## Hours, by hand
#
# What the mathematics needs can be counted: FLOPs of a step, from the architecture and the lengths
# of the documents. Hours are FLOPs over what the chips deliver, and that is their peak times a
# utilisation (MFU) which only a measurement tells. 40 % is a fair hope; this is no promise.

# %%
import numpy as np

from train.common.flops import PEAK, model_flops

tokens = config.global_batch_size * config.sequence_length
documents = np.full(
    config.global_batch_size, config.sequence_length
)  # full rows: attention costs the most


def hours(phase, device: str, chips: int, mfu: float) -> float:
    """Hours of a phase on so many chips."""
    flops = model_flops(config.model, documents, phase.mlm_probability * tokens).train
    return phase.tokens / tokens * flops / (chips * PEAK[device].flops * mfu) / 3600


for device in ("TPU v5 lite", "TPU v6 lite"):
    both = sum(hours(phase, device, 16, 0.4) for phase in config.phases)
    print(f"16 x {device}: {both:6.1f} hours for both phases at 40 % MFU")

# %% [markdown]
# ## Memory, from the compiler
#
# Whether it fits is harder to count. libtpu compiles the whole training step for devices that are
# not here and says what it takes: `python -m train plan --config bioclinical_base --topology
# v5e:4x4 --json FILE`. Four such files lie in `train/plan/examples`; the README has more of them in
# a table.

# %%
import json
from pathlib import Path

import train.plan

COMMITTED = Path(train.plan.__file__).parent / "examples"
plans = {}
for size in ("base", "large"):
    for slice_ in ("v5e:4x4", "v6e:4x4"):
        plans[size, slice_] = json.loads(
            (COMMITTED / f"{size}_{slice_.replace(':', '_')}.json").read_text()
        )

if not REAL:
    print("read from train/plan/examples; MODERNBERT_REAL=1 compiles")
elif importlib.util.find_spec("libtpu") is None:
    print("libtpu is not installed, so nothing is compiled: pip install libtpu")
else:
    command = (
        f"-m modernbert_jax plan --config bioclinical_base --topology {TOPOLOGY} --json plan.json"
    )
    subprocess.run([sys.executable, *command.split()], check=True)
    plans["base", TOPOLOGY] = json.loads(Path("plan.json").read_text())

# %%
from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

kinds = ("parameters", "moments", "batch", "activations and temporaries", "code")
figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
names = [f"{size}\n{slice_}" for size, slice_ in plans]
bottom = np.zeros(len(plans))
for kind in kinds:
    part = np.array([plan["memory_bytes"][kind] / 2**30 for plan in plans.values()])
    axis.bar(names, part, bottom=bottom, label=kind, width=0.6)
    bottom += part
for x, plan in enumerate(plans.values()):
    axis.hlines(plan["available_bytes"] / 2**30, x - 0.4, x + 0.4, color="crimson", ls="--")
axis.set(ylabel="GiB a device", title="memory of a step; dashed: what there is")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Each row below is one step of phase 1. Parameters and moments are thin, since they are split over
# 16 devices. Activations fill what the rows of a micro-batch make them fill: `plan` chooses the
# fewest micro-batches that fit.

# %%
print(
    f"{'':14}{'micro-batches':>14}{'padding':>12}{'communication':>15}{'at least':>11}"
    f"{'at 40 %':>9}"
)
for (size, slice_), plan in plans.items():
    communication = sum(entry["communication_bytes"] for entry in plan["collectives"].values())
    first = plan["phases"][0]
    print(
        f"{size:6}{slice_:8}{plan['gradient_accumulation_steps']:>14}"
        f"{plan['batch_padding']:>12.1%}{communication / 1e9:>12.1f} GB"
        f"{first['compute_lower_bound_seconds']:>9.2f} s{first['seconds_per_step']:>7.2f} s"
    )

# %% [markdown]
# The count by hand agrees with the plan's, apart from padding.

# %%
base = plans["base", "v5e:4x4"]
for phase, planned in zip(config.phases, base["phases"], strict=True):
    own = hours(phase, base["device"], base["chips"], base["mfu"]) / (1 - base["batch_padding"])
    assert abs(own / planned["hours"] - 1) < 0.01
    print(f"{phase.name:16} by hand {own:5.1f} h, planned {planned['hours']:5.1f} h")

# %% [markdown]
# ## Cost, at your price
#
# The prices are made up: put yours in, for a chip and an hour.

# %%
PRICE = {"v5e": 1.0, "v6e": 2.5}

figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
mfu = np.linspace(0.15, 0.6, 40)
for (size, slice_), plan in plans.items():
    chip_hours = sum(phase["chip_hours"] for phase in plan["phases"]) * plan["mfu"] / mfu
    axis.plot(mfu * 100, chip_hours * PRICE[slice_[:3]], label=f"{size}, {slice_}")
axis.axvline(40, color="grey", lw=0.8)
axis.set(xlabel="model FLOPs utilisation, per cent", ylabel="cost of both phases")
axis.set_ylim(0)
axis.legend(fontsize=8)
plt.show()

for (size, slice_), plan in plans.items():
    total = sum(phase["hours"] for phase in plan["phases"])
    chips = sum(phase["chip_hours"] for phase in plan["phases"])
    print(
        f"{size:6} {slice_}: {total:6.1f} h, {chips:6,.0f} chip-hours, "
        f"{chips * PRICE[slice_[:3]]:6,.0f} at {PRICE[slice_[:3]]:.2f} a chip-hour"
    )

# %% [markdown]
# ## Next
#
# - When a slice is yours, the first steps of `pretrain` print tokens per second and the real MFU;
#   put it in above.
# - `--search` finds the largest micro-batch that fits; `--mesh.fsdp`, `--remat`,
#   `--global-batch-size` and every other field of the config are options of `plan`, too.
# - `notebooks/guides/tpu_pods.md`: create the slice, start on all hosts, resume.
