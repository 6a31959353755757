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
# **At the end** you will know, for TPU slices that you do not have yet, whether a run fits into
# their memory, how much it communicates, how many hours it takes and what it costs at your price.
#
# **Time:** 5 s on 2 CPU cores, and some minutes more if you compile a plan of your own. You need no
# TPU.

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

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # compile the plan below, do not read it

# %% [markdown]
# ## The run
#
# The run is BioClinical ModernBERT-base: 160 billion tokens of PubMed, PMC and clinical text, then
# 8 billion tokens of clinical text alone, in sequences of 8,192 tokens.

# %%
from train import configs

TOPOLOGY = "v5e:4x4"  # 16 chips
config = configs.load("bioclinical_base")
for phase in config.phases:
    print(
        f"{phase.name:16} {phase.tokens / 1e9:6.1f} billion tokens, "
        f"{phase.mlm_probability:.0%} masked"
    )
print(f"a step has {config.global_batch_size} sequences of {config.sequence_length:,} tokens")

# %% [markdown]
# ## Hours, from a formula
#
# The FLOPs of a step follow from the architecture and the lengths of the documents. The hours are
# the FLOPs divided by what the chips deliver: their peak times the model FLOPs utilization (MFU).
# The formula does not know the MFU: 40 % here is a number to start from.

# %%
import numpy as np

from train.common.flops import PEAK, model_flops

tokens = config.global_batch_size * config.sequence_length
# Documents that fill a sequence have the largest cost of attention.
documents = np.full(config.global_batch_size, config.sequence_length)


def hours(phase, device: str, chips: int, mfu: float) -> float:
    """Returns the hours of a phase on this number of chips."""
    flops = model_flops(config.model, documents, phase.mlm_probability * tokens).train
    return phase.tokens / tokens * flops / (chips * PEAK[device].flops * mfu) / 3600


for device in ("TPU v5 lite", "TPU v6 lite"):
    both = sum(hours(phase, device, 16, 0.4) for phase in config.phases)
    print(f"16 x {device}: {both:6.1f} hours for both phases at 40 % MFU")

# %% [markdown]
# ## Memory and time, from the compiler
#
# No simple formula shows whether the run fits into memory and how well it uses the chips. libtpu
# compiles the whole training step for absent devices, and `python -m train plan --config
# bioclinical_base --topology v5e:4x4 --json FILE` reports the memory that it needs and two times
# for a step. The folder `train/plan/examples` has four such files, and
# `notebooks/guides/hardware.md` a table with more of them.

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
    print("read from train/plan/examples; MODERNBERT_REAL=1 compiles a plan")
elif importlib.util.find_spec("libtpu") is None:
    print("nothing is compiled, because libtpu is not installed: pip install libtpu")
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
axis.set(ylabel="GiB per device", title="memory of a step; dashed: available memory")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Parameters and moments are small because they are split over 16 devices. The activations grow with
# the size of a micro-batch, and `plan` chooses the smallest number of micro-batches that fits.
#
# ## Where the time goes
#
# The **roofline** gives each operation the longer of its memory traffic over the bandwidth and its
# matrix products over the peak. The **estimate** adds up the cycles that the compiler expects. A
# real step takes longer than the roofline; how it compares with the estimate, only a run shows.

# %%
figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
bottom = np.zeros(len(plans))
for kind in plans["base", TOPOLOGY]["time"]:
    part = np.array([plan["time"][kind]["estimated_seconds"] for plan in plans.values()])
    axis.bar(names, part, bottom=bottom, label=kind, width=0.6)
    bottom += part
for x, plan in enumerate(plans.values()):
    roofline = plan["phases"][0]["roofline_seconds_per_step"]
    axis.hlines(roofline, x - 0.4, x + 0.4, color="crimson", ls="--")
axis.set(ylabel="seconds", title="estimated time of a step; dashed: roofline")
axis.legend(fontsize=8)
plt.show()

print(f"{'':14}{'micro-batches':>14}{'padding':>9}{'roofline':>20}{'estimate':>20}")
for (size, slice_), plan in plans.items():
    first = plan["phases"][0]
    print(
        f"{size:6}{slice_:8}{plan['gradient_accumulation_steps']:>14}{plan['batch_padding']:>9.1%}"
        + "".join(
            f"{first[f'{kind}_seconds_per_step']:>8.2f} s ({first[f'{kind}_mfu']:.0%} MFU)"
            for kind in ("roofline", "estimated")
        )
    )

# %% [markdown]
# With the estimated MFU our formula agrees with the plan.

# %%
base = plans["base", "v5e:4x4"]
for phase, planned in zip(config.phases, base["phases"], strict=True):
    expected = hours(phase, base["device"], base["chips"], planned["estimated_mfu"])
    assert abs(expected / planned["estimated_hours"] - 1) < 0.01
    print(f"{phase.name:16} formula {expected:5.1f} h, plan {planned['estimated_hours']:5.1f} h")

# %% [markdown]
# ## Cost, at your price
#
# These prices per chip-hour are only examples; replace them with yours.

# %%
PRICE = {"v5e": 1.0, "v6e": 2.5}

figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
share = np.linspace(0.1, 0.6, 40)
for (size, slice_), plan in plans.items():
    # The chip-hours are inversely proportional to the MFU.
    by_mfu = sum(phase["estimated_chip_hours"] * phase["estimated_mfu"] for phase in plan["phases"])
    (line,) = axis.plot(100 * share, by_mfu / share * PRICE[slice_[:3]], label=f"{size}, {slice_}")
    for kind, marker in (("estimated", "o"), ("roofline", "^")):
        mfu = plan[f"{kind}_mfu"]
        axis.plot(100 * mfu, by_mfu / mfu * PRICE[slice_[:3]], marker, color=line.get_color())
axis.set(
    xlabel="model FLOPs utilization, percent (circle: estimate, triangle: roofline)",
    ylabel="cost of both phases",
)
axis.set_ylim(0)
axis.legend(fontsize=8)
plt.show()

for (size, slice_), plan in plans.items():
    total = sum(phase["estimated_hours"] for phase in plan["phases"])
    chips = sum(phase["estimated_chip_hours"] for phase in plan["phases"])
    print(
        f"{size:6} {slice_}: {total:6.1f} h, {chips:6,.0f} chip-hours, "
        f"{chips * PRICE[slice_[:3]]:6,.0f} at {PRICE[slice_[:3]]:.2f} a chip-hour, as estimated"
    )

# %% [markdown]
# ## Next
#
# - Once you have a slice, the first steps of `pretrain` print the tokens per second and the real
#   MFU. Find its cost in the last figure.
# - `--search` chooses the micro-batch and the rematerialization policy with the shortest step.
#   `--mesh.fsdp`, `--fused-local-layers`, `--global-batch-size` and every other field of the config
#   are flags of `plan` as well.
# - `notebooks/guides/tpu_pods.md` shows how to create the slice, start on all hosts, and resume.
