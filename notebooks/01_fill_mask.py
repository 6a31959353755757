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
# **At the end** you have the masked words of a sentence, from the two snippets that every model
# card has, with one import changed; and notes as vectors.
#
# **Time:** 45 s on 2 CPU cores, most of it for training a small model in place of a download.

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

REAL = bool(os.environ.get("MODERNBERT_REAL"))  # the released checkpoint, from the hub

# %% [markdown]
# ## A model
#
# The released one; or three layers of width 64, trained here and now on 1,500 made-up notes
# (notebook 3 shows how). That one knows the phrases of its notes and nothing else: read its answers
# as a sign that all parts work.

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
# The result has the form that `transformers` gives it.

# %%
from modernbert_jax import pipeline  # was: from transformers import pipeline

pipe = pipeline("fill-mask", model=MODEL)
pipe("Furosemide 40 mg twice [MASK] was started for heart failure.", top_k=2)

# %% [markdown]
# Several masks give a list for each mask, several texts a list for each text.


# %%
def show(text: str, **options) -> None:
    """The answers on a line a mask."""
    answers = pipe(text, **options)
    print(text)
    for mask in answers if isinstance(answers[0], list) else [answers]:
        print("   ", ", ".join(f"{a['token_str'].strip()} {a['score']:.0%}" for a in mask))


show("with a [MASK] of 96 and a blood [MASK] of 124/59.", top_k=3)
show("He will be seen in the neurology [MASK] in 12 [MASK].", top_k=3)

# %% [markdown]
# `targets` asks for some words only. The title of the patient should decide here. The small model
# has learned that it is a man or a woman, and not yet to look at the title: for that `--config
# demo` trains four times as long.

# %%
show("Ms. Novak is a 63-year-old [MASK] who was seen for leg swelling.", targets=[" woman", " man"])
show("Mr. Novak is a 63-year-old [MASK] who was seen for leg swelling.", targets=[" woman", " man"])

# %% [markdown]
# And this no made-up note says. The released model does know it.

# %%
show("[MASK] is a disease caused by an uncontrolled division of abnormal cells.", top_k=3)

# %% [markdown]
# A text without a mask is refused, with a line that says what is missing.

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
predicted_token_id = outputs.logits[0, masked_index].argmax(axis=-1)
print("Predicted token:", tokenizer.decode(predicted_token_id))

# %% [markdown]
# Logits are numbers for every word of the vocabulary: here the probabilities of the likeliest ten.

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
# The model is a Flax module. `nnx.display(model)` shows all of it; a layer's attention is enough
# here.

# %%
from flax import nnx

nnx.display(model.model.layers[1].attn)

# %% [markdown]
# ## Notes as vectors
#
# `Embedder` packs texts of any lengths into full rows and gives a vector for each, in the order of
# the texts.

# %%
from modernbert_jax import Embedder
from train.corpora.synthetic import synthetic_notes

notes = sorted(synthetic_notes(48, seed=1))  # a note begins with its kind
embedder = Embedder.from_pretrained(MODEL, pooling="mean")
vectors = embedder.encode(notes, batch_tokens=4_096)
print(vectors.shape, vectors.dtype)

# %% [markdown]
# Cosines between all pairs. The squares along the diagonal are the four kinds of note.

# %%
kinds = [note.splitlines()[0].lower() for note in notes]
first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
image = axis.imshow(vectors @ vectors.T, cmap="viridis", interpolation="nearest")
axis.set_yticks(first, [kinds[i] for i in first])
axis.set_xticks([])
figure.colorbar(image, label="cosine")
plt.show()

# %% [markdown]
# ## Next
#
# - `pipeline(..., compile_cache="cache")` keeps compiled programs: the next process starts without
#   compiling.
# - Notebook 3 trains the model used here, notebook 4 fine-tunes it, notebook 5 looks inside.
