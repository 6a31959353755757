"""Model cards: the README.md beside config.json, with the YAML that the hub reads.

Only what is known stands in it: the configuration, and the facts that the caller gives. A card
carries MARK; a README.md without it is a person's and stays as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CARD_FILE = "README.md"
MARK = "<!-- Made by modernbert_jax. Delete this line to keep your changes: then it is yours. -->"

# What goes into the YAML; the last two replace what follows from the class.
HUB_FACTS = (
    *("base_model", "language", "license", "datasets", "metrics", "tags"),
    *("library_name", "pipeline_tag"),
)
FACTS = (*HUB_FACTS, "title", "training", "tables", "limits", "citations")

# transformers' class, without its model's name -> the hub's task and what the class adds.
_TASKS = {
    "ForMaskedLM": ("fill-mask", "with its masked-LM head"),
    "ForSequenceClassification": ("text-classification", "with a sequence classifier"),
    "ForTokenClassification": ("token-classification", "with a token classifier"),
    "ForQuestionAnswering": ("question-answering", "with a head for extractive questions"),
    "ForMultipleChoice": ("multiple-choice", "with a multiple-choice head"),
    "Model": ("feature-extraction", "without a head"),
}
_CITATION = """\
@article{modernbert,
  title = {Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory
           Efficient, and Long Context Finetuning and Inference},
  author = {Benjamin Warner and Antoine Chaffin and Benjamin Clavié and Orion Weller and
            Oskar Hallström and Said Taghadouini and Alexis Gallagher and Raja Biswas and
            Faisal Ladhak and Tom Aarsen and Nathan Cooper and Griffin Adams and
            Jeremy Howard and Iacopo Poli},
  journal = {arXiv:2412.13663},
  year = {2024},
}"""
_SNIPPET = """\
```python
from {library} import {model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_HUB_ID")
model = {model}.from_pretrained("FOLDER_OR_HUB_ID")
outputs = model(**tokenizer({text}, return_tensors="{tensors}"))
```"""
_SENTENCES = """\
```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("FOLDER_OR_HUB_ID").encode(["A text."])
```"""


def model_card(
    config: Mapping[str, Any], parameters: int, facts: Mapping[str, Any] | None = None
) -> str:
    """The card of a model as Markdown with YAML in front.

    config: the content of an HF config.json, of any encoder. parameters: how many. facts, each may
    be left out: base_model and datasets (hub ids), language, license, metrics, tags, library_name,
    pipeline_tag (all as the hub names them), title, training {name: value}, tables {title: rows,
    each {column: value}}, limits and citations (a line each). Raises ValueError with one line for
    another fact, or a base_model or data set that is no hub id.
    """
    facts = _checked(facts or {})
    name = (config.get("architectures") or ["ModernBertModel"])[0]
    ending = next((e for e in _TASKS if name.endswith(e)), "Model")
    task, head = _TASKS[ending]
    ours = config.get("model_type") == "modernbert"
    # The hub knows transformers, which loads these files: it shows how, and counts downloads.
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    metadata |= {k: v for k, v in facts.items() if k in HUB_FACTS}
    tags = ["modernbert", "modernbert_jax"] if ours else []
    if tags := list(dict.fromkeys([*tags, *_listed(facts.get("tags", ()))])):
        metadata["tags"] = tags
    from huggingface_hub import ModelCardData  # here: no one who only loads a model waits for it

    parts = [
        f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{MARK}",
        f"# {_text(facts.get('title') or name)}",
        _about(config, name, head, parameters),
        "## Use",
        *_snippets(ending, ours, metadata["library_name"]),
    ]
    if training := facts.get("training"):
        parts += ["## Training", "\n".join(f"- {k}: {_text(v)}" for k, v in training.items())]
    for title, rows in facts.get("tables", {}).items():
        if rows:
            parts += [f"## {title}", _table(rows)]
    parts += ["## Limits", "\n".join(f"- {_text(line)}" for line in _limits(config, facts))]
    if ours:
        parts += ["## Citation", f"```bibtex\n{_CITATION}\n```"]
    if citations := facts.get("citations"):
        parts += ["\n".join(f"- {_text(line)}" for line in citations)]
    return "\n\n".join(parts) + "\n"


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
                    f"{value!r}; what is not on the hub goes into `training`"
                ) from None
    return {k: v for k, v in facts.items() if v not in (None, "") and v != [] and v != ()}


def _listed(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _about(config: Mapping[str, Any], name: str, head: str, parameters: int) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    lines = [
        f"`{name}`: an encoder {head}; layers: {config.get('num_hidden_layers')}, width: "
        f"{config.get('hidden_size')}, parameters: {parameters:,} in {dtype}."
    ]
    if longest := config.get("max_position_embeddings"):
        lines.append(f"Context: {longest:,} tokens.")
    labels = list((config.get("id2label") or {}).values())
    if "Classification" in name and labels:
        more = f" and {len(labels) - 30} more" if len(labels) > 30 else ""
        lines.append(f"Labels: {', '.join(map(_text, labels[:30]))}{more}.")
    return "\n".join(lines)


def _snippets(ending: str, ours: bool, library: str) -> list[str]:
    # Multiple choice wants each text as often as there are choices, with a choice each.
    text = (
        '[["A text."] * 2], [["This.", "That."]]' if ending == "ForMultipleChoice" else '"A text."'
    )
    how = {"model": f"Auto{'Model' if ending == 'Model' else 'Model' + ending}", "text": text}
    parts = []
    if ours:
        parts.append(_SNIPPET.format(library="modernbert_jax", tensors="np", **how))
        parts.append("The same files in transformers and torch:")
    parts.append(_SNIPPET.format(library="transformers", tensors="pt", **how))
    if library == "sentence-transformers":
        parts += ["As embeddings, pooled and of length 1:", _SENTENCES]
    return parts


def _limits(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    lines = list(facts.get("limits", ()))
    if longest := config.get("max_position_embeddings"):
        lines.append(f"Texts beyond {longest:,} tokens must be cut, or read in windows.")
    return [*lines, "Weights can give away parts of the text that they were trained on."]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_text(row.get(c, "")) for c in columns) + " |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    """One line that breaks no table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return " ".join(str(value).split()).replace("|", "\\|")
