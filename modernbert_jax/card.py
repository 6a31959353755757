"""Model cards: the README.md beside config.json, whose YAML the Hugging Face Hub reads.

A card states only what is known: the configuration, and the facts that the caller passes. It
contains MARK; a README.md without MARK was written by a person and is not overwritten.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modernbert_jax.untrusted import printable

CARD_FILE = "README.md"
MARK = "<!-- Made by modernbert_jax. Delete this line to keep your changes: then it is yours. -->"

# These go into the YAML; the last two replace what follows from the class.
HUB_FACTS = ("base_model", "language", "license", "datasets", "metrics", "tags")
HUB_FACTS += ("library_name", "pipeline_tag")
FACTS = (*HUB_FACTS, "title", "training", "tables", "limits", "citations")

# transformers' class without its model's name: the hub's task, and what the class adds.
_TASKS = {
    "ForMaskedLM": ("fill-mask", "with its masked-LM head"),
    "ForSequenceClassification": ("text-classification", "with a sequence classifier"),
    "ForTokenClassification": ("token-classification", "with a token classifier"),
    "ForQuestionAnswering": ("question-answering", "with a head for extractive questions"),
    "ForMultipleChoice": ("multiple-choice", "with a multiple-choice head"),
    "Model": ("feature-extraction", "without a head"),
}
_CITATION = """\
```bibtex
@article{modernbert,
  title = {Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory
           Efficient, and Long Context Finetuning and Inference},
  author = {Benjamin Warner and Antoine Chaffin and Benjamin Clavié and Orion Weller and
            Oskar Hallström and Said Taghadouini and Alexis Gallagher and Raja Biswas and
            Faisal Ladhak and Tom Aarsen and Nathan Cooper and Griffin Adams and
            Jeremy Howard and Iacopo Poli},
  journal = {arXiv:2412.13663},
  year = {2024},
}
```"""
_SNIPPET = """\
```python
from {library} import {model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_ID")
model = {model}.from_pretrained("FOLDER_OR_HUB_ID")
outputs = model(**tokenizer({text}, return_tensors="{tensors}"))
```"""
_SENTENCES = """\
As normalized embeddings:

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("FOLDER_OR_HUB_ID").encode(["A text."])
```"""


_MULTI_VECTOR = """\
As normalized embeddings of each token, scored by MaxSim:

```python
from modernbert_jax import MultiVectorEmbedder

model = MultiVectorEmbedder.from_pretrained("FOLDER_OR_HUB_ID")
found = model.rank("A query.", ["A text.", "Another text."])
```"""
_FURTHER = {"sentence-transformers": _SENTENCES, "PyLate": _MULTI_VECTOR}


def model_card(
    config: Mapping[str, Any], parameters: int, facts: Mapping[str, Any] | None = None
) -> str:
    """Returns the card of a model: Markdown after a YAML header.

    config: the content of a Hugging Face config.json, of any encoder. parameters: their number.
    facts, all optional: base_model and datasets (hub ids), language, license, metrics, tags,
    library_name, pipeline_tag (all with the hub's names), title, training {name: value}, tables
    {title: rows, each {column: value}}, limits and citations (one line each). Raises ValueError
    with one line for another fact, or for a base_model or data set that is not a hub id.
    """
    # Imported here, because loading a model does not need it.
    from huggingface_hub import ModelCard, ModelCardData

    facts = _checked(facts or {})
    names = config.get("architectures")
    name = _foreign(names[0]) if isinstance(names, list) and names else "ModernBertModel"
    suffix = next((s for s in _TASKS if name.endswith(s)), "Model")
    task, head = _TASKS[suffix]
    ours = config.get("model_type") == "modernbert"
    # The hub knows transformers, which loads these files, and shows its snippets.
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    data |= {k: v for k, v in facts.items() if k in HUB_FACTS}
    tags = ["modernbert", "modernbert_jax"] if ours else []
    if tags := list(dict.fromkeys([*tags, *_listed(facts.get("tags", ()))])):
        data["tags"] = tags
    parts = [
        f"---\n{ModelCardData(**data).to_yaml()}\n---\n{MARK}",
        f"# {_text(facts.get('title') or name)}",
        _about(config, name, head, parameters),
        *_usage(suffix, ours, data["library_name"]),
    ]
    if training := facts.get("training"):
        parts += ["## Training", _bullets(f"{k}: {_text(v)}" for k, v in training.items())]
    for title, rows in facts.get("tables", {}).items():
        if rows:
            parts += [f"## {title}", _table(rows)]
    limits = list(facts.get("limits", ()))
    if longest := _count(config, "max_position_embeddings"):
        limits.append(f"Truncate texts beyond {longest:,} tokens, or read them in windows.")
    limits.append("Weights can reveal parts of the text that they were trained on.")
    parts += ["## Limits", _bullets(map(_text, limits))]
    if ours:
        parts += ["## Citation", _CITATION]
    if citations := facts.get("citations"):
        parts.append(_bullets(map(_text, citations)))
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if unknown := sorted(set(facts) - set(FACTS)):
        raise ValueError(f"card: expected {', '.join(FACTS)}; got {', '.join(unknown)}")
    for name in ("base_model", "datasets"):
        for value in _listed(facts.get(name) or ()):
            try:
                validate_repo_id(value)
            except HFValidationError:
                raise ValueError(
                    f"card: {name}: expected a hub id such as answerdotai/ModernBERT-base, got "
                    f"{value!r}; describe what is not on the hub in `training`"
                ) from None
    return {k: v for k, v in facts.items() if v not in (None, "") and v != [] and v != ()}


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _about(config: Mapping[str, Any], name: str, head: str, parameters: int) -> str:
    dtype = _foreign(config.get("dtype") or config.get("torch_dtype") or "float32")
    lines = [
        f"`{name}`: an encoder {head}; layers: {_count(config, 'num_hidden_layers')}, width: "
        f"{_count(config, 'hidden_size')}, parameters: {parameters:,} in {dtype}."
    ]
    if longest := _count(config, "max_position_embeddings"):
        lines.append(f"Context: {longest:,} tokens.")
    id2label = config.get("id2label")
    labels = list(id2label.values()) if isinstance(id2label, Mapping) else []
    if "Classification" in name and labels:
        more = f" and {len(labels) - 30} more" if len(labels) > 30 else ""
        lines.append(f"Labels: {', '.join(map(_foreign, labels[:30]))}{more}.")
    return "\n".join(lines)


def _usage(suffix: str, ours: bool, library: str) -> list[str]:
    model = f"AutoModel{'' if suffix == 'Model' else suffix}"
    # Multiple choice repeats each text, once with each of its choices.
    choice = '[["A text."] * 2], [["This.", "That."]]'
    text = choice if suffix == "ForMultipleChoice" else '"A text."'
    libraries = {"modernbert_jax": "np"} if ours else {}
    parts = ["## Use"]
    for name, tensors in (libraries | {"transformers": "pt"}).items():
        parts.append(_SNIPPET.format(library=name, model=model, text=text, tensors=tensors))
    return [*parts, _FURTHER[library]] if library in _FURTHER else parts


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([_text(row.get(c, "")) for c in columns] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _count(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int and 0 < value < 2**63 else None


def _foreign(value: Any) -> str:
    """A string of somebody else's config.json as plain text in Markdown, on one line."""
    text = _text(value) if isinstance(value, int | float) else printable(value)
    return re.sub(r"([\\`*\[\]<>|#~&!])", r"\\\1", text)


def _text(value: Any) -> str:
    """One line that fits into a table."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(_text, value))
    return printable(" ".join(str(value).split()), 2000).replace("|", "\\|")
