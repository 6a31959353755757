"""The losses of a bi-encoder, as functions of its vectors.

Each takes columns, the vectors [*, D] of each column of the examples in a batch, and targets, the
number or numbers that each example comes with (None without any), and returns a scalar. Each equals
the loss of sentence-transformers that its docstring names, value and gradient.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from modernbert_jax.inference.sentence import unit
from modernbert_jax.precision import einsum

from .config import RetrievalConfig

Columns = Sequence[jax.Array]
Loss = Callable[[Columns, jax.Array | None], jax.Array]


def loss_of(config: RetrievalConfig) -> Loss:
    """Returns the loss that a configuration names."""
    temperature = config.divisor
    loss: Loss = {
        "mnrl": functools.partial(mnrl, temperature=temperature),
        "cosent": functools.partial(cosent, temperature=temperature),
        "mse": mse,
        "margin-mse": margin_mse,
        "kl": functools.partial(kl, temperature=temperature),
    }[config.loss]
    if not config.matryoshka_dims:
        return loss
    weights = config.matryoshka_weights or (1.0,) * len(config.matryoshka_dims)
    return functools.partial(
        matryoshka, loss=loss, dims=config.matryoshka_dims, weights=tuple(weights)
    )


def mnrl(columns: Columns, targets: jax.Array | None = None, *, temperature: float) -> jax.Array:
    """Mean cross-entropy (nats) of picking the positive of each query among all documents.

    columns: queries [Q, D], positives [Q, D], then any number of negatives. The positives of other
    queries are negatives too. Source: MultipleNegativesRankingLoss, which is InfoNCE.
    """
    queries_QD, documents_MD = unit(columns[0]), unit(jnp.concatenate(columns[1:]))
    scores_QM = einsum("QD,MD->QM", queries_QD, documents_MD) / temperature
    own = jnp.arange(len(queries_QD))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores_QM, own))


def cosent(columns: Columns, targets: jax.Array, *, temperature: float) -> jax.Array:
    """log(1 + sum of exp(s_j - s_i) over all i, j with a higher target for i than for j).

    s: cosines divided by the temperature. columns: both texts of each pair [N, D]. targets: a score
    for each pair [N]; only their order counts. Source: CoSENTLoss.
    """
    scores_N = jnp.sum(unit(columns[0]) * unit(columns[1]), axis=-1) / temperature
    excess_NN = scores_N[None, :] - scores_N[:, None]
    ordered_NN = targets[:, None] > targets[None, :]
    terms = jnp.where(ordered_NN, excess_NN, -jnp.inf).ravel()
    return jax.nn.logsumexp(jnp.append(terms, 0.0))


def mse(columns: Columns, targets: jax.Array) -> jax.Array:
    """Mean squared difference from a teacher's vectors.

    columns: the texts [N, D]. targets: the teacher's vectors [N, E], of which the first D count: a
    shortened vector is compared with the teacher's first numbers. Source: MSELoss.
    """
    (vectors_ND,) = columns
    return jnp.mean((vectors_ND - targets[:, : vectors_ND.shape[1]]) ** 2)


def margin_mse(columns: Columns, targets: jax.Array) -> jax.Array:
    """Mean squared difference of margins from a teacher's: score of the positive less a negative's.

    Scores are dot products. columns: queries, positives and C - 1 columns of negatives, each
    [Q, D]. targets: the teacher's scores of the documents in that order [Q, C]. Source:
    MarginMSELoss.
    """
    scores_QC = _own_scores(columns)
    margin = lambda scores: scores[:, :1] - scores[:, 1:]  # noqa: E731
    return jnp.mean((margin(scores_QC) - margin(targets)) ** 2)


def kl(columns: Columns, targets: jax.Array, *, temperature: float) -> jax.Array:
    """`divergence` of the dot products of each query with its documents from a teacher's scores.

    columns and targets as in `margin_mse`. Source: DistillKLDivLoss.
    """
    return divergence(_own_scores(columns), targets, temperature)


def divergence(scores_QC: jax.Array, targets_QC: jax.Array, temperature: float) -> jax.Array:
    """Mean over queries of KL(teacher || student) in nats, times the square of the temperature.

    Each is the softmax of its scores, divided by the temperature, over the documents of a query.
    The square keeps the size of the gradient at high temperatures (arXiv 1503.02531).
    """
    student_QC = jax.nn.log_softmax(scores_QC / temperature)
    teacher_QC = jax.nn.log_softmax(targets_QC / temperature)
    terms_Q = jnp.sum(jnp.exp(teacher_QC) * (teacher_QC - student_QC), axis=-1)
    return jnp.mean(terms_Q) * temperature**2


def _own_scores(columns: Columns) -> jax.Array:
    """The dot products [Q, C] of each query [Q, D] with its document of each column [Q, D]."""
    queries_QD, *documents = columns
    return jnp.stack([jnp.sum(queries_QD * d, axis=-1) for d in documents], axis=-1)


def matryoshka(
    columns: Columns,
    targets: jax.Array | None = None,
    *,
    loss: Loss,
    dims: Sequence[int],
    weights: Sequence[float],
) -> jax.Array:
    """Weighted sum of a loss over vectors that are cut to each dimension and scaled to length 1.

    Source: MatryoshkaLoss, arXiv 2205.13147.
    """
    terms = [
        weight * loss([unit(column[:, :dim]) for column in columns], targets)
        for dim, weight in zip(dims, weights, strict=True)
    ]
    return functools.reduce(jnp.add, terms)
