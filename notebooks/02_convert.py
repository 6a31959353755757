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
# # 2 · Convert in both directions, and read the parity report
#
# **At the end** you will have a checkpoint in three layouts (Hugging Face, Orbax and Composer), a
# check that no bit was lost between them, its weights split over several devices, and a parity
# report which shows that this library computes the same values as `transformers`.
#
# **Time:** 20 s on 2 CPU cores. Nothing is downloaded.

# %%
import importlib.util
import os
import subprocess
import sys

SOURCE = "..."  # git+https://... or the URL of a wheel, unless the package is installed
if importlib.util.find_spec("modernbert_jax") is None:
    package = f"modernbert_jax[train,convert,notebooks] @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
if importlib.util.find_spec("train") is None:  # a wheel holds it inside the package
    import modernbert_jax

    sys.path.append(modernbert_jax.__path__[0])

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # use the released checkpoint, from the hub

# %% [markdown]
# ## A checkpoint in Hugging Face's layout
#
# This is either the released ModernBERT-base, or a model of the same architecture and one
# thousandth of its size, with random weights from a seed. For one section, the CPU pretends to be
# four devices.

# %%
import tempfile
from pathlib import Path

import jax
from flax import nnx

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from train.corpora.build.bpe import train_bpe
from train.corpora.synthetic import synthetic_notes

os.chdir(tempfile.mkdtemp())  # the files below are written there
if REAL:
    from modernbert_jax.checkpoint.hub import resolve

    SOURCE = str(resolve("answerdotai/ModernBERT-base"))
else:
    jax.config.update("jax_num_cpu_devices", 4)
    SOURCE = "hf"
    config = ModernBertConfig.tiny(vocab_size=512, hidden_size=64, intermediate_size=96)
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(SOURCE, tokenizer=train_bpe(synthetic_notes(50, seed=0), 512))

for file in sorted(Path(SOURCE).iterdir()):
    print(f"{file.stat().st_size:12,} bytes  {file.name}")

# %% [markdown]
# ## To Orbax and back
#
# The command line is `python -m convert COMMAND SRC DST`, or `modernbert-jax convert COMMAND SRC
# DST` with a wheel. Here we call it in this process.

# %%
import contextlib
import io

from convert.cli import main


def convert(command: str) -> None:
    """Runs `python -m convert COMMAND`, and leaves out the line with time and memory."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if main([*command.split(), "--overwrite"]):
            raise RuntimeError("the command failed")
    print("$ python -m convert", command)
    print(*printed.getvalue().splitlines()[:2], sep="\n")


convert(f"from-hf {SOURCE} orbax")
convert("to-hf orbax hf_again")

# %% [markdown]
# Every tensor has the same bits as before.

# %%
from modernbert_jax.checkpoint.hf import SafetensorsFolder


def same_bits(one: str, other: str) -> None:
    """Compares two folders in Hugging Face's layout, tensor by tensor."""
    a, b = SafetensorsFolder(one), SafetensorsFolder(other)
    assert set(a) == set(b)
    assert all(a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes() for key in a)
    print(f"{len(a)} tensors, the same bits")


same_bits(SOURCE, "hf_again")

# %% [markdown]
# ## What a conversion changes
#
# It changes only the shapes. Our weights have one axis for each logical dimension, so that heads
# and MLP halves can be split over devices without rearranging them: `Wqkv` is [D, 3, H, K], while
# torch stores [3·H·K, D].

# %%
from modernbert_jax.checkpoint.params import flatten

here, there = flatten(ModernBertForMaskedLM.from_pretrained("orbax")), SafetensorsFolder(SOURCE)
print(f"{'parameter':42}{'here':>18}{'in the file':>14}")
for key in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", "mlp_norm"):
    key = f"model.layers.1.{key}.weight"
    print(f"{key:42}{str(here[key].shape):>18}{str(there[key].shape):>14}")

# %% [markdown]
# ## Straight onto several devices
#
# `from_pretrained(..., mesh=mesh)` reads each weight straight to the devices that hold a part of
# it, so that no device needs room for all of them. Over a mesh axis `fsdp` a weight is split by its
# model dimension, over `tensor` by heads, MLP or vocabulary. (`shard_params(model, mesh)` moves a
# model that exists; notebook 8 splits a batch.)

# %%
import numpy as np

mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
spread = ModernBertForMaskedLM.from_pretrained("orbax", mesh=mesh)
for key in ("embeddings.tok_embeddings", "layers.1.attn.Wqkv", "layers.1.mlp.Wo", "final_norm"):
    weight = flatten(spread)[f"model.{key}.weight"]
    part = weight.addressable_shards[0].data.shape
    print(f"{key:26}{str(weight.shape):16} {str(weight.sharding.spec):30} {part} on a device")
held = sum(x.addressable_shards[0].data.nbytes for x in flatten(spread).values())
whole = sum(x.nbytes for x in here.values())
print(f"{mesh.size} devices, {held / whole:.0%} of the weights on each")

# %% [markdown]
# The logits are those of one device, and the model is saved in the same way, with the same bits.

# %%
forward = nnx.jit(lambda model, ids: model(ids).logits)
token_ids = np.random.default_rng(0).integers(0, 500, (2, 32))
one = ModernBertForMaskedLM.from_pretrained("orbax")
difference = np.abs(np.asarray(forward(spread, token_ids)) - np.asarray(forward(one, token_ids)))
print(f"largest difference of a logit: {difference.max():.0e}")
spread.save_pretrained("hf_from_mesh")
same_bits(SOURCE, "hf_from_mesh")

# %% [markdown]
# ## The parity report
#
# `check` runs our model and the one of `transformers` on the same tokens: without padding, with
# padding, and longer than the window. It compares every layer. It needs torch, and without it we
# skip this part.

# %%
import json

report = None
if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    main(["check", "orbax", "--json", "parity.json"])
    report = json.loads(Path("parity.json").read_text())
else:
    print("torch or transformers is not installed: nothing to compare with")

# %% [markdown]
# Each number is the largest error of a layer, relative to the largest value of that layer. Float32
# rounds at 6e-8, and errors grow a little with depth. A wrong computation would show errors of 1e-2
# and more.

# %%
from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

if report:
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    rows = list(report["errors"])
    for name in report["inputs"]:
        axis.semilogy([report["errors"][row][name] + 1e-9 for row in rows], "o-", label=name)
    axis.axhline(report["tolerance"], color="crimson", ls="--", label="tolerance")
    axis.set_xticks(range(len(rows)), rows, rotation=30 if len(rows) < 12 else 90)
    axis.set(ylabel="relative error", title="error relative to transformers, layer by layer")
    axis.legend(fontsize=8, ncols=2)
    plt.show()

# %% [markdown]
# The report also identifies what was compared: it holds hashes of the weights and the
# configuration, and the versions of all packages.

# %%
if report:
    for name in ("model", "weights_sha256", "config_sha256", "worst", "tolerance", "passed"):
        value = report[name]
        print(f"{name:15} {value[:16] + '...' if name.endswith('sha256') else value}")

# %% [markdown]
# ## Composer
#
# ModernBERT was trained with Composer, and its intermediate checkpoints are `.pt` files of that
# library. The converter reads them with `torch.load(weights_only=True)`, so no code in a file runs.
# It also writes them, so that the original trainer can resume from one of our models. Both need
# torch.

# %%
if importlib.util.find_spec("torch"):
    convert("to-composer orbax latest-rank0.pt")
    convert("from-composer latest-rank0.pt orbax_again")
    convert("to-hf orbax_again hf_from_composer")
    same_bits(SOURCE, "hf_from_composer")

# %% [markdown]
# ## Next
#
# - `python -m convert from-composer FILE.pt DIR --optimizer` also converts the optimizer's moments.
#   `python -m train pretrain --init-from DIR --init-optimizer` then continues where the release
#   stopped.
# - Everything in this library loads both layouts: `from_pretrained("orbax")` works as well.
