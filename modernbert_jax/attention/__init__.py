"""Bounded attention: one function with several implementations, each in its own file.

`attention` chooses an implementation for the device or runs the one that is named.
`python -m modernbert_jax.attention` checks and times all of them on the available device.
"""

from modernbert_jax.attention.bounds import Bounds, make_bounds, make_segment_ids
from modernbert_jax.attention.context import context_parallel
from modernbert_jax.attention.dispatch import (
    COMPILED as COMPILED,
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    KERNELS as KERNELS,
    MEASURED as MEASURED,
    PROVEN as PROVEN,
    Choice,
    attention,
    check,
    choose,
    default_device as default_device,
    generation_of as generation_of,
    packed_heads as packed_heads,
    passes as passes,
    refusal,
    row_major as row_major,
    sharded,
)

__all__ = [
    "Bounds",
    "Choice",
    "attention",
    "check",
    "choose",
    "context_parallel",
    "make_bounds",
    "make_segment_ids",
    "refusal",
    "sharded",
]
