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
# # 1 · Fill a mask
#
# **At the end** you will have filled the masked words of a sentence with the two snippets of the
# model card, with one import changed, and turned notes into vectors.
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
# ## A model
#
# This is either the released model, or three layers of width 64 that we train here on 1,500
# synthetic notes (notebook 3 shows how). The small model has learned the phrases of its notes and
# nothing else, so its answers only show that all parts work.

# %%
import contextlib
import io

MODEL = "thomas-sounack/BioClinical-ModernBERT-base"
if not REAL:
    MODEL = "runs/notebook/export"
    if not os.path.exists(MODEL):
        from train.configs.notebook import get_config
        from train.pretrain.run import run

        with contextlib.redirect_stdout(io.StringIO()):
            result = run(get_config())
        print(f"trained on {result['total_tokens']:,} tokens in {result['steps']} steps")

# %% [markdown]
# ## The first snippet: a pipeline
#
# The result is the same list of dictionaries that `transformers` returns.

# %%
from modernbert_jax import pipeline  # was: from transformers import pipeline

pipe = pipeline("fill-mask", model=MODEL)
pipe("Furosemide 40 mg twice [MASK] was started for heart failure.", top_k=2)

# %% [markdown]
# A text with several masks returns a list for each mask, and several texts return a list for each
# text.


# %%
def show(text: str, **options) -> None:
    """Prints the answers, one line per mask."""
    answers = pipe(text, **options)
    print(text)
    for mask in answers if isinstance(answers[0], list) else [answers]:
        print("   ", ", ".join(f"{a['token_str'].strip()} {a['score']:.0%}" for a in mask))


show("He was afebrile at 36.8 degrees, with a [MASK] of 96 and a blood [MASK] of 124/59.", top_k=3)
show("He will be seen in the neurology [MASK] in 12 [MASK] by Dr. Vasquez.", top_k=3)

# %% [markdown]
# `targets` restricts the answers to some words. Here the title of the patient should decide. The
# small model has learned that the word is man or woman, but not yet that it depends on the title;
# `--config demo` trains four times as long and learns it.

# %%
show("Ms. Novak is a 63-year-old [MASK] who was seen for leg swelling.", targets=[" woman", " man"])
show("Mr. Novak is a 63-year-old [MASK] who was seen for leg swelling.", targets=[" woman", " man"])

# %% [markdown]
# No synthetic note contains this fact. The released model knows it.

# %%
show("[MASK] is a disease caused by an uncontrolled division of abnormal cells.", top_k=3)

# %% [markdown]
# A text without a mask raises an error that says what is missing.

# %%
try:
    pipe("He has heart failure.")
except ValueError as error:
    print(error)

# %% [markdown]
# ## The second snippet: the model itself

# %%
from modernbert_jax import AutoModelForMaskedLM, AutoTokenizer  # was: from transformers import ...

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForMaskedLM.from_pretrained(MODEL)

text = "Furosemide 40 mg twice [MASK] was started for heart failure."
inputs = tokenizer(text, return_tensors="np")
outputs = model(**inputs)

masked_index = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
predicted_token_id = int(outputs.logits[0, masked_index].argmax(axis=-1))
print("Predicted token:", tokenizer.decode(predicted_token_id))

# %% [markdown]
# The logits hold one number for each token of the vocabulary. This plot shows the probabilities of
# the ten most likely tokens.

# %%
import jax
import numpy as np
from matplotlib import pyplot as plt

plt.rcParams["figure.dpi"] = 70

p_V = np.asarray(jax.nn.softmax(outputs.logits[0, masked_index]))
best = np.argsort(-p_V)[:10]
figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
axis.barh([tokenizer.decode([int(i)]).strip() for i in best][::-1], p_V[best][::-1])
axis.set(xscale="log", xlabel="probability", title=text)
plt.show()

# %% [markdown]
# The model is a Flax module. `nnx.display(model)` shows all of it; here we show the attention of
# one layer.

# %%
from flax import nnx

nnx.display(model.model.layers[1].attn)

# %% [markdown]
# ## Notes as vectors
#
# `Embedder` packs texts of any length into full sequences and returns one vector per text, in the
# order of the texts.

# %%
from modernbert_jax import Embedder
from train.corpora.synthetic import synthetic_notes

notes = sorted(synthetic_notes(48, seed=1))  # a note starts with its kind
embedder = Embedder.from_pretrained(MODEL, pooling="mean")
vectors = embedder.encode(notes, batch_tokens=4_096)
print(vectors.shape, vectors.dtype)

# %% [markdown]
# The plot shows the cosine similarity of all pairs. The squares along the diagonal are the four
# kinds of note.

# %%
kinds = [note.splitlines()[0].lower() for note in notes]
first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
image = axis.imshow(vectors @ vectors.T, cmap="viridis", interpolation="nearest")
axis.set_yticks(first, [kinds[i] for i in first])
axis.set_xticks([])
figure.colorbar(image, label="cosine similarity")
plt.show()

# %% [markdown]
# ## Next
#
# - `pipeline(..., compile_cache="cache")` keeps the compiled programs, so that the next process
#   starts without compiling.
# - Notebook 3 trains the model used here, notebook 4 fine-tunes it, and notebook 5 inspects its
#   attention.
