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
# # 5 · Inside attention
#
# **At the end** you will have seen the two kinds of layers, what each head attends to, how an
# answer forms from layer to layer, why packed notes do not attend to each other, and which blocks a
# kernel visits.
#
# **Time:** 45 s on 2 CPU cores. Most of it trains a small model, which replaces a download.

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

# %% [markdown]
# ## A window is two integers
#
# Every third layer is global: a token attends to its whole text. The other layers are local: a
# token attends to `window` tokens on either side. In both cases the keys of a query form one
# interval, from `lo` to `hi`, and no matrix is stored. The plot shows the intervals for 48 tokens
# and a window of 6; ModernBERT's window is 64.

# %%
import numpy as np
from matplotlib import pyplot as plt

from modernbert_jax.attention import make_bounds

plt.rcParams["figure.dpi"] = 70

one_text = np.ones((1, 48), np.int32)
figure, axes = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained")
for axis, window in zip(axes, (None, 6), strict=True):
    bounds = make_bounds(one_text, window)
    axis.imshow(bounds.as_mask()[0], cmap="Blues", vmin=0, vmax=1.4)
    axis.set(title="global" if window is None else f"local, window {window}", xlabel="key")
    print(f"query 20 sees the keys {bounds.lo_BL[0, 20]} to {bounds.hi_BL[0, 20] - 1}")
axes[0].set_ylabel("query")
plt.show()

# %% [markdown]
# ## RoPE: two frequencies
#
# RoPE rotates pairs of channels of a head by angles that grow with the position. Each pair has its
# own frequency, and the dot product of a query and a key depends on their distance. `theta` sets
# the lowest frequency. Local layers, with distances up to 64, use 10,000; global layers, with
# distances up to 8,192, use 160,000.

# %%
from modernbert_jax import ModernBertConfig
from modernbert_jax.attention.rope import rope_tables

config = ModernBertConfig.base()
distance = np.unique(np.geomspace(1, 8192, 120).astype(int))
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for kind in ("full_attention", "sliding_attention"):
    theta = config.rope_theta(kind)
    frequency = theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)  # radians per token
    cos_1LK, _ = rope_tables(distance[None], config.head_dim, theta)
    label = f"theta {theta:,.0f} ({'global' if kind == 'full_attention' else 'local'})"
    axes[0].semilogy(2 * np.pi / frequency, label=label)
    near = distance <= (8192 if kind == "full_attention" else config.window)
    axes[1].semilogx(distance[near], np.asarray(cos_1LK)[0].mean(-1)[near], label=label)
axes[0].axhline(8192, color="grey", ls=":")
axes[0].axhline(128, color="grey", ls=":")
axes[0].set(xlabel="pair", ylabel="tokens", title="period; dotted: 128 and 8,192 tokens")
axes[1].set(xlabel="distance, tokens", title="dot product of a vector with itself at a distance")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What heads attend to
#
# The model is either the released one, or three layers of width 64 with a window of 16 that we
# train here on synthetic notes (notebook 3 shows how).

# %%
import contextlib
import io

from modernbert_jax import AutoModelForMaskedLM, AutoTokenizer

MODEL = "thomas-sounack/BioClinical-ModernBERT-base"
if not REAL:
    MODEL = "runs/notebook/export"
    if not os.path.exists(MODEL):
        from train.configs.notebook import get_config
        from train.pretrain.run import run

        with contextlib.redirect_stdout(io.StringIO()):
            run(get_config())
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForMaskedLM.from_pretrained(MODEL)
print(f"window {model.config.window}:", ", ".join(model.config.layer_types[:3]))

# %% [markdown]
# `capture` returns hidden states and attention maps by name, for any model of this library. It
# computes only what you name, and other calls are not slower because of it.

# %%
from modernbert_jax import capture
from train.corpora.synthetic import synthetic_notes

note = next(n for n in synthetic_notes(50, seed=2) if n.startswith("PROGRESS"))
note = note.replace("twice daily", "twice [MASK]").replace("times daily", "times [MASK]")
input_ids = tokenizer(note, return_tensors="np")["input_ids"]
inside = capture(model, ["attentions.*", "hidden_states.*"], input_ids=input_ids)
for name, array in list(inside.items())[-3:]:
    print(name, array.shape)

# %% [markdown]
# The plot shows the mean attention map of all heads of a layer, for the first 80 tokens. A darker
# color means that the query (row) has a larger weight on the key (column). The band in the local
# layers is the window.

# %%
layers, few_blues = range(3), plt.get_cmap("Blues", 8)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
for axis, layer in zip(axes, layers, strict=True):
    weights_LM = np.asarray(inside[f"attentions.{layer}"])[0].mean(0)[:80, :80]
    axis.imshow(weights_LM**0.4, cmap=few_blues, interpolation="nearest")
    axis.set(title=f"layer {layer}, {model.config.layer_types[layer].split('_')[0]}", xlabel="key")
axes[0].set_ylabel("query")
plt.show()

# %% [markdown]
# Heads differ in how far they attend. This is the mean distance between a query and the keys,
# weighted by attention, in tokens.

# %%
length = input_ids.shape[1]
distance_LM = np.abs(np.arange(length)[:, None] - np.arange(length))
for layer in layers:
    weights_HLM = np.asarray(inside[f"attentions.{layer}"])[0]
    reach_H = (weights_HLM * distance_LM).sum(-1).mean(-1)
    print(f"layer {layer}:", "  ".join(f"{reach:5.1f}" for reach in reach_H))

# %% [markdown]
# This is what the masked word attends to, averaged over all heads of a layer.

# %%
tokens = tokenizer.convert_ids_to_tokens(input_ids[0].tolist())
position = tokens.index(tokenizer.mask_token)
around = tokenizer.decode(input_ids[0, position - 8 : position + 4].tolist())
print(f"...{around}...")
for layer in layers:
    weights_M = np.asarray(inside[f"attentions.{layer}"])[0, :, position].mean(0)
    best = np.argsort(-weights_M)[:5]
    words = [tokenizer.decode([int(input_ids[0, i])]) for i in best]
    shown = ", ".join(f"{w!r} ({i - position:+d})" for w, i in zip(words, best, strict=True))
    print(f"layer {layer}: {shown}")

# %% [markdown]
# ## From layer to layer
#
# The hidden states at the masked word, in the same dictionary: how long the vector is, how far the
# layer has turned it, and what the head would answer if the model ended there (a "logit lens"). The
# last one has passed the final norm, and its answer is the model's. A probe would be trained on
# such states.

# %%
answer = tokenizer(" daily", add_special_tokens=False)["input_ids"][0]  # the word that was masked
states = [inside[f"hidden_states.{i}"][0, position] for i in range(len(model.model.layers) + 1)]
print("after       length  cosine with the one before  p(daily)  first answer")
for i, state in enumerate(states):
    before = states[max(i - 1, 0)]
    cosine = (state @ before) / np.linalg.norm(state) / np.linalg.norm(before)
    normed = state if i == len(states) - 1 else model.model.final_norm(state)
    logits_V = np.asarray(model.logits(model.head(normed)), np.float64)
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    name, turned = (f"layer {i - 1}", f"{cosine:.2f}") if i else ("embeddings", "")
    first = tokenizer.decode([int(p_V.argmax())])
    print(f"{name:10} {np.linalg.norm(state):7.1f} {turned:>27} {p_V[answer]:9.3f}  {first!r}")

# %% [markdown]
# ## Packing
#
# Here three notes share one sequence, and `segment_ids` separate them. The interval of a query ends
# where its note ends. The map of a global layer therefore consists of blocks, and each note gets
# the same output as on its own.

# %%
texts = [" ".join(n.split()[:16]) for n in synthetic_notes(3, seed=3)]
ids = [tokenizer(text)["input_ids"] for text in texts]
packed = np.concatenate(ids)[None]
segment_ids = np.repeat([1, 2, 3], [len(i) for i in ids])[None]
inside = capture(model, ["attentions.[01]", "logits"], input_ids=packed, segment_ids=segment_ids)

figure, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
for axis, layer in zip(axes, (0, 1), strict=True):
    weights_LM = np.asarray(inside[f"attentions.{layer}"])[0].mean(0)
    axis.imshow(weights_LM**0.4, cmap=few_blues, interpolation="nearest")
    axis.set(title=f"layer {layer}, {model.config.layer_types[layer].split('_')[0]}", xlabel="key")
axes[0].set_ylabel("query")
plt.show()

alone = model(np.asarray(ids[1])[None]).logits[0]
there = inside["logits"][0, segment_ids[0] == 2]
print(f"largest difference of a logit, packed and alone: {np.abs(alone - there).max():.0e}")

# %% [markdown]
# ## The blocks that a kernel visits
#
# A kernel works on tiles of 128 x 128. The intervals give the first and the last tile of keys for
# each tile of queries, and the kernel visits no other tile. The plot shows a sequence of 8,192
# tokens with eight packed texts.

# %%
from modernbert_jax.attention.bounds import tile_bounds

lengths = (1900, 420, 1300, 90, 800, 2200, 300, 900)
segments = np.zeros((1, 8192), np.int32)
segments[0, : sum(lengths)] = np.repeat(np.arange(1, 9), lengths)
tiles = np.arange(8192 // 128)
figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.8), layout="constrained")
for axis, (kind, window) in zip(axes, (("global", None), ("local", 64)), strict=True):
    lo_T, hi_T = (np.asarray(x)[0] for x in tile_bounds(make_bounds(segments, window), 128, 128))
    visited = (lo_T[:, None] <= tiles) & (tiles < hi_T[:, None])
    axis.imshow(visited, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axis.set(title=f"{kind}: {visited.mean():.1%} of the tiles", xlabel="tile of keys")
axes[0].set_ylabel("tile of queries")
plt.show()

# %% [markdown]
# ## Next
#
# - `python -m modernbert_jax.attention` checks and times every implementation on your device.
# - `Embedder(layer=...)` makes vectors of texts from any layer.
