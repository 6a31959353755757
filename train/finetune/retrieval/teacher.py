"""Distillation: what a teacher says about the examples, computed once before training.

A teacher is an embedding model or a cross-encoder, here or in torch (sentence-transformers, which
also reads plain models of transformers). Its answers are numbers; OUT/teacher-DIGEST.safetensors
keeps them with the teacher's name and fingerprint, and never a text.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from modernbert_jax import Embedder, Reranker
from modernbert_jax.checkpoint.files import CONFIG_FILE, write_bytes
from modernbert_jax.inference.pipelines.text_ranking import read_ranking
from modernbert_jax.inference.sentence import read_sentence, unit_array
from modernbert_jax.untrusted import MAX_MODEL_JSON, read_json

from ...common.card import start_facts
from ...common.workdir import start_folder
from .config import RetrievalConfig
from .data import Examples


def teach(
    config: RetrievalConfig, examples: Examples, width: int
) -> tuple[np.ndarray, dict[str, str]]:
    """Returns (the targets of the examples, the facts that identify their teacher).

    Targets are the teacher's vectors [examples, width], scaled to length 1 as the student's are,
    or its scores of the documents [examples, C]. They are read from OUT if the same teacher has
    answered for the same texts. width: of the student's vectors. Raises ValueError if the teacher
    does not fit the loss, or if the file in OUT is damaged.
    """
    assert config.teacher is not None
    folder = pathlib.Path(start_folder(config.teacher))
    ranks = _ranks(folder)
    if ranks and config.loss == "mse":
        raise ValueError(
            f"teacher: {config.teacher} is a cross-encoder, which has no vectors; use --loss "
            "margin-mse or kl, or an embedding model"
        )
    facts = {
        "teacher": start_facts(config.teacher)["name"],
        "kind": "cross-encoder" if ranks else "embedding model",
        "backend": config.teacher_backend,
        "sha256": _digest(folder),
    }
    question = json.dumps(facts | {"loss": config.loss, "texts": _texts_digest(examples)})
    name = f"teacher-{hashlib.sha256(question.encode()).hexdigest()[:12]}.safetensors"
    path = pathlib.Path(config.out) / name
    targets = _read(path, question)
    if targets is None:
        targets = _answers(config, examples, folder, ranks, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = safetensors.numpy.save({"targets": targets}, {"question": question})
        write_bytes(path, content)
    if config.loss == "mse":
        _check_width(config, targets.shape[1], width)
    return targets, facts


def _answers(
    config: RetrievalConfig, examples: Examples, folder: pathlib.Path, ranks: bool, width: int
) -> np.ndarray:
    rows, model = examples.texts, _load(config, folder, ranks)
    if config.loss == "mse":
        _check_width(config, _dimension(model), width)
        return unit_array(model.encode([text for (text,) in rows]))
    pairs = [(row[0], document) for row in rows for document in row[1:]]
    if ranks:
        scores = model.predict(pairs)
    else:
        queries = model.encode_query([row[0] for row in rows])
        documents = model.encode_document([document for _, document in pairs])
        repeated = np.repeat(queries, [len(row) - 1 for row in rows], axis=0)
        scores = np.asarray(model.similarity_pairwise(repeated, documents))
    return np.ascontiguousarray(scores.reshape(len(rows), -1), np.float32)


def _load(config: RetrievalConfig, folder: pathlib.Path, ranks: bool) -> Any:
    if config.teacher_backend == "jax":
        model: Any = (Reranker if ranks else Embedder).from_pretrained(folder)
    else:
        # These files may name classes; what is not known here is refused before torch imports it.
        (read_ranking if ranks else read_sentence)(folder)
        try:
            import sentence_transformers
        except ModuleNotFoundError:
            raise RuntimeError(
                "teacher_backend: torch needs sentence-transformers: pip install "
                "sentence-transformers"
            ) from None
        cls = "CrossEncoder" if ranks else "SentenceTransformer"
        model = getattr(sentence_transformers, cls)(str(folder))
    labels = 1
    if ranks:
        labels = model.model.config.num_labels if isinstance(model, Reranker) else model.num_labels
    if labels != 1:
        raise ValueError(f"teacher: expected a cross-encoder with 1 label, got {labels}")
    return model


def _dimension(model: Any) -> int:
    return model.dimension if isinstance(model, Embedder) else model.get_embedding_dimension()


def _check_width(config: RetrievalConfig, given: int, width: int) -> None:
    if given != width:
        raise ValueError(
            f"teacher: expected vectors of {width} numbers, as the student's, with --loss mse, got "
            f"{given} from {config.teacher}; margin-mse and kl take any teacher"
        )


def _ranks(folder: pathlib.Path) -> bool:
    """Whether a folder has a classifier of texts, by the class that its config.json names."""
    path = folder / CONFIG_FILE  # in old embedding models, it is in a folder within
    names = read_json(path, MAX_MODEL_JSON).get("architectures") if path.exists() else None
    return isinstance(names, list) and str(names[0]).endswith("ForSequenceClassification")


def _digest(folder: pathlib.Path) -> str:
    """sha256 (hex) of the files of a model, by their names within its folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _texts_digest(examples: Examples) -> str:
    total = hashlib.sha256()
    for row in examples.texts:
        total.update(json.dumps(row).encode())
    return total.hexdigest()


def _read(path: pathlib.Path, question: str) -> np.ndarray | None:
    """The stored targets, None without the file."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("question") == question:
                return file.get_tensor("targets")
    except safetensors.SafetensorError:
        pass
    raise ValueError(f"{path}: the file is damaged; delete it, and the same command makes it again")
