"""Scores of a bi-encoder: how well it ranks documents, and how well its cosines order pairs."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from modernbert_jax.inference.sentence import unit_array

from .data import Examples, read_judged, read_scored

Encode = Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a model is scored with. judged: of `read_judged`. pairs: of `read_scored`."""

    judged: tuple[list[str], list[str], list[dict[int, float]]] | None = None
    pairs: Examples | None = None

    def score(self, encode: Encode, dims: Sequence[int] = ()) -> dict[str, float]:
        """The scores of vectors; those of shortened ones are named dim_256_ndcg@10 and so on.

        encode: texts to unit vectors [texts, D]. dims: further dimensions; D itself adds nothing.
        """
        found: dict[str, float] = {}
        if self.judged is not None:
            queries, documents, relevant = self.judged
            vectors = encode(queries), encode(documents)
            for prefix, (queries_QD, documents_MD) in _shortened(vectors, dims).items():
                scores = retrieval_scores(queries_QD, documents_MD, relevant)
                found |= {prefix + name: value for name, value in scores.items()}
        if self.pairs is not None and self.pairs.targets is not None:
            vectors = tuple(encode(list(column)) for column in zip(*self.pairs.texts, strict=True))
            for prefix, (first_ND, second_ND) in _shortened(vectors, dims).items():
                scores = pair_scores(first_ND, second_ND, self.pairs.targets)
                found |= {prefix + name: value for name, value in scores.items()}
        return found


def read_measures(folder: pathlib.Path) -> Measures:
    """Reads the files for scores that a folder has. Raises ValueError or FileNotFoundError."""
    judged = read_judged(folder) if (folder / "qrels.tsv").exists() else None
    pairs = folder / "pairs.jsonl"
    return Measures(judged, read_scored(pairs) if pairs.exists() else None)


def _shortened(vectors: Sequence[np.ndarray], dims: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """{the prefix of a score's name: the vectors, cut to a dimension and of length 1 again}."""
    width = vectors[0].shape[1]
    found = {"": list(vectors)}
    for dim in sorted(set(dims) - {width}, reverse=True):
        found[f"dim_{dim}_"] = [unit_array(v[:, :dim]) for v in vectors]
    return found


def pair_scores(
    first_ND: np.ndarray, second_ND: np.ndarray, scores_N: np.ndarray
) -> dict[str, float]:
    """Spearman's and Pearson's correlation of the scores of pairs with the products of vectors."""
    cosines_N = np.sum(first_ND * second_ND, axis=1)
    pearson = lambda x, y: float(np.corrcoef(x, y)[0, 1])  # noqa: E731
    return {
        "spearman": pearson(_ranks(cosines_N), _ranks(scores_N)),
        "pearson": pearson(cosines_N, scores_N),
    }


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """The rank of each value; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def retrieval_scores(
    queries_QD: np.ndarray, documents_MD: np.ndarray, relevant: list[dict[int, float]], k: int = 10
) -> dict[str, float]:
    """nDCG@k, recall@k, recall@100 and MRR@k by brute force. relevant: {document: gain} per query.

    nDCG as in trec_eval: linear gains, log2 discount. Of equal scores the earlier document wins.
    """
    blocks = (
        queries_QD[first : first + 256] @ documents_MD.T for first in range(0, len(queries_QD), 256)
    )
    return ranking_scores(blocks, relevant, k)


def ranking_scores(
    blocks: Iterable[np.ndarray], relevant: list[dict[int, float]], k: int = 10
) -> dict[str, float]:
    """As `retrieval_scores`, of the scores of all documents: blocks [*, M] of queries in order."""
    found: dict[str, list[float]] = {name: [] for name in ("ndcg", "recall", "recall100", "mrr")}
    judged = iter(relevant)
    for scores_QM in blocks:
        order_QM = np.argsort(-scores_QM, axis=1, kind="stable")[:, : max(k, 100)]
        for order, gains in zip(order_QM, judged, strict=False):
            got = [gains.get(int(d), 0.0) for d in order]
            discount = 1 / np.log2(np.arange(2, k + 2))
            ideal = sorted(gains.values(), reverse=True)[:k]
            best = float(np.dot(ideal, discount[: len(ideal)]))
            found["ndcg"].append(float(np.dot(got[:k], discount[: len(got[:k])])) / best)
            hits = sum(g > 0 for g in gains.values())
            found["recall"].append(sum(g > 0 for g in got[:k]) / hits)
            found["recall100"].append(sum(g > 0 for g in got[:100]) / hits)
            found["mrr"].append(next((1 / n for n, g in enumerate(got[:k], 1) if g > 0), 0.0))
    names = {"ndcg": f"ndcg@{k}", "recall": f"recall@{k}", "recall100": "recall@100"}
    return {names.get(n, f"mrr@{k}"): float(np.mean(v)) for n, v in found.items()}
