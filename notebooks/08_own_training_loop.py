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
# # 8 · Your own training loop
#
# **At the end** you will have trained a classifier in a loop of your own, with a frozen encoder,
# with LoRA and completely, seen how far its probabilities can be trusted and where it errs, and
# split it over devices.
#
# **Time:** 150 s on 2 CPU cores. Half of it trains a small model, which replaces a download.

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
# ## A pretrained model
#
# This is either the released model, or three layers of width 64 that we train here on synthetic
# notes (notebook 3 shows how). For the last section, the CPU pretends to be two devices.

# %%
import contextlib
import dataclasses
import io

import jax

MODEL, SCALE = "thomas-sounack/BioClinical-ModernBERT-base", 1
if not REAL:
    jax.config.update("jax_num_cpu_devices", 2)
    MODEL, SCALE = "runs/notebook/export", 100  # a small model needs larger learning rates
    if not os.path.exists(MODEL):
        from train.common.sharding import MeshShape
        from train.configs.notebook import get_config
        from train.pretrain.run import run

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(dataclasses.replace(get_config(), mesh=MeshShape(data=1)))

# %% [markdown]
# ## Sentences
#
# Does a sentence affirm a condition or negate it? The model reads both. The last 240 examples are
# for the evaluation, among them sentences that name two conditions.

# %%
import random

from train.corpora.synthetic import DIAGNOSES

LABELS = ("affirmed", "negated")
CONDITIONS = sorted({symptom for diagnosis in DIAGNOSES for symptom in diagnosis.symptoms})
TEMPLATES = (
    ("The patient has {0}.", 0),
    ("She came in with {0} for two days.", 0),
    ("No change in {0} since the last visit.", 0),  # "no" negates the change
    ("He denies {0}.", 1),
    ("There is no {0} today.", 1),
    ("The {0} has resolved.", 1),
    ("He has {0} without {1}.", 0),
    ("No {0}, but {1} is worse.", 1),
)
draw = random.Random(0)
examples = []
for _ in range(960):
    template, label = draw.choice(TEMPLATES)
    conditions = draw.sample(CONDITIONS, 2)
    if "{1}" in template and draw.random() < 0.5:  # ask for the other condition
        examples.append((template.format(*conditions), conditions[1], 1 - label))
    else:
        examples.append((template.format(*conditions), conditions[0], label))
for example in examples[:3]:
    print(example)

# %% [markdown]
# The tokenizer pads all of them to one length, so that the step is compiled once. What it returns
# is a pytree of arrays, which a compiled function takes as it is.

# %%
import numpy as np

from modernbert_jax import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
sentences, conditions, labels = zip(*examples, strict=True)
tokens = tokenizer(list(sentences), list(conditions), padding=True, return_tensors="np")
labels = np.array(labels)
TRAIN, TEST = slice(0, 720), slice(720, 960)
print(tokens["input_ids"].shape)


def part(where) -> dict[str, np.ndarray]:
    """Returns the tokens of some examples."""
    return {name: array[where] for name, array in tokens.items()}


# %% [markdown]
# ## The loop
#
# `labels=` gives the loss. `wrt` says which parameters train: the same filter goes to the optimizer
# and to the gradient. `train()` turns dropout on, `eval()` turns it off.

# %%
import optax
from flax import nnx

from modernbert_jax import ModernBertForSequenceClassification


@nnx.jit
def probabilities(model, batch):
    return jax.nn.softmax(model(**batch).logits)


def fit(model, wrt, rate: float, epochs: int, batch_size: int = 48) -> list[float]:
    """Trains the parameters that `wrt` selects and returns the loss of each step."""
    steps = epochs * (720 // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=wrt)

    @nnx.jit
    def train_step(model, optimizer, batch, labels):
        def loss_of(model):
            return model(**batch, labels=labels).loss

        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return loss

    model.train()
    losses, shuffle = [], np.random.default_rng(0)
    for _ in range(epochs):
        for where in shuffle.permutation(720).reshape(-1, batch_size):
            losses.append(float(train_step(model, optimizer, part(where), labels[where])))
    model.eval()
    return losses


def new_model():
    """Returns the encoder with a new head."""
    with contextlib.redirect_stderr(io.StringIO()):  # a warning that the head is new
        return ModernBertForSequenceClassification.from_pretrained(
            MODEL, id2label=dict(enumerate(LABELS)), classifier_dropout=0.1, seed=0
        )


# %% [markdown]
# ## A frozen encoder, LoRA, and all of it
#
# The first filter leaves out what is below `model`, the encoder. The second one adds the adapters
# that `lora.add_lora` puts into the encoder's linear layers (`lora.save_adapter` writes them in
# PEFT's layout).

# %%
from modernbert_jax import lora

HEAD = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("model")))
found, losses = {}, {}
for name, wrt, rate in (
    ("frozen encoder", HEAD, 3e-5),
    ("LoRA", nnx.Any(HEAD, lora.LoRAParam), 3e-5),
    ("everything", nnx.Param, 2e-5),
):
    model = new_model()
    if name == "LoRA":
        lora.add_lora(model, rank=4, alpha=8)
    losses[name] = fit(model, wrt, rate * SCALE, epochs=6)
    found[name] = np.asarray(probabilities(model, part(TEST)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, wrt)))
    accuracy = (found[name].argmax(-1) == labels[TEST]).mean()
    print(f"{name}: {count:,} parameters, accuracy {accuracy:.1%}")

# %% [markdown]
# ## Can the probabilities be trusted?
#
# Of the answers with a confidence of 80%, 80% should be right. Each point is a fifth of the
# evaluation examples, sorted by confidence.

# %%
from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
for name, values in losses.items():
    axes[0].plot(np.convolve(values, np.ones(8) / 8, "valid"), label=name)
axes[0].set(title="loss", xlabel="step")
axes[0].legend()
for name, values in found.items():
    confidence, right = values.max(-1), values.argmax(-1) == labels[TEST]
    bins = np.array_split(np.argsort(confidence), 5)
    points = [(confidence[i].mean(), right[i].mean()) for i in bins]
    error = sum(len(i) * abs(x - y) for i, (x, y) in zip(bins, points, strict=True)) / 240
    axes[1].plot(*zip(*points, strict=True), "o-")
    print(f"{name}: expected calibration error {error:.3f}")
axes[1].plot([0.5, 1], [0.5, 1], color="grey", ls=":")
axes[1].set(title="calibration", xlabel="confidence", ylabel="right")
plt.show()

# %% [markdown]
# ## Where it errs
#
# The errors of the complete model by template, and how sure it was of them. (With your own notes,
# do not publish the sentences.)

# %%
wrong = found["everything"].argmax(-1) != labels[TEST]
confidence = found["everything"].max(-1)
kinds = np.array([s.replace(c, "...") for s, c, _ in examples[TEST]])
kinds = np.array(["two conditions" if " but " in k or "without" in k else k for k in kinds])
print(f"{'template':45} wrong of  confidence")
for kind in sorted(set(kinds), key=lambda kind: -wrong[kinds == kind].mean()):
    where = kinds == kind
    mean = f"{confidence[where & wrong].mean():.2f}" if (where & wrong).any() else ""
    print(f"{kind:45} {(where & wrong).sum():5} {where.sum():2}  {mean}")

# %% [markdown]
# ## Several devices
#
# `jax.make_mesh` names the devices. `from_pretrained(..., mesh=mesh)` reads weights straight to
# them, and `shard_params` moves a model that exists. An axis `fsdp` would split the weights; `data`
# repeats them, and splits the batch.

# %%
from jax.sharding import NamedSharding, PartitionSpec as P

from modernbert_jax import shard_params

mesh = jax.make_mesh((len(jax.devices()),), ("data",))
model = shard_params(model, mesh)
batch = jax.device_put(part(TEST), NamedSharding(mesh, P("data")))
spread = probabilities(model, batch)
print(spread.sharding.spec, "on", mesh.size, "devices")
print(f"largest difference: {np.abs(np.asarray(spread) - found['everything']).max():.0e}")

# %% [markdown]
# ## Save it
#
# The folder has Hugging Face's layout: `pipeline`, transformers and `from_pretrained` read it.

# %%
from modernbert_jax import pipeline

model.save_pretrained("runs/own_loop", tokenizer=tokenizer)
pipe = pipeline("text-classification", model="runs/own_loop")
answer = pipe({"text": "There is no fever today.", "text_pair": "fever"})
print(answer)

# %% [markdown]
# ## Next
#
# - `modernbert_jax.losses` has the losses as functions, for outputs of your own.
# - `dropout_key=` passes keys of your own, for a loop with optax alone: the README has one.
# - `python -m train finetune` packs short texts, repeats seeds and picks the best epoch (see
#   notebook 4).
