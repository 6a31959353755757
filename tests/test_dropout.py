"""The bits of dropout: rates, independence, avalanche, gradients, and that nothing is stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from modernbert_jax.dropout import PartKeys, _mix, dropout, fold

ROWS, WIDTH, RATE = 512, 768, 0.1


@functools.partial(jax.jit, static_argnums=(0, 2))
def dropped(shape, key, rate=RATE):
    return dropout(jnp.ones(shape), rate, key) == 0


def bits(*numbers, shape=(ROWS, WIDTH)):
    """Which elements are dropped with the key of (step, micro-batch, layer, site, ...)."""
    key = jax.random.key(0)
    for number in numbers:
        key = fold(key, number)
    return np.asarray(dropped(shape, key))


def correlation(a, b):
    """The correlation of two arrays of bits in standard deviations of independent ones."""
    a, b = a.ravel() - RATE, b.ravel() - RATE
    return abs((a * b).mean()) / (RATE * (1 - RATE)) * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.999])
def test_rate_is_within_binomial_bounds(rate):
    """In total, and in each row, each column and each block: the counts vary as coins do."""
    x = np.asarray(dropped((2048, 1024), jax.random.key(7), rate)).astype(np.float64)
    assert abs(x.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    for counts, n in (
        (x.sum(0), 2048),
        (x.sum(1), 1024),
        (x.reshape(64, 32, 32, 32).sum((1, 3)).ravel(), 1024),
    ):
        chi = ((counts - n * rate) ** 2 / (n * rate * (1 - rate))).sum()
        assert abs(chi - len(counts)) < 5 * np.sqrt(2 * len(counts) * (1 + 1 / (n * rate)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("distance", [1, 2, 3, 8, 64, 128, 256])
def test_neighbors_are_independent(axis, distance):
    x = np.moveaxis(bits(0), axis, 0)
    assert correlation(x[:-distance], x[distance:]) < 5


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_steps_sequences_layers_and_sites_are_independent(place):
    """Keys that differ in one number of (step, sequence, layer, site); at the same element, at
    its neighbors, and at those whose row differs by a power of two."""
    numbers = [3, 1, 5, 0]
    a = bits(*numbers)
    for other in (1, 2, 4, 1024):
        numbers[place] += other
        b = bits(*numbers)
        for shift in (0, 1, 2, 4, 128):
            assert correlation(a, np.roll(b, shift, 0)) < 5
            assert correlation(a, np.roll(b, shift, 1)) < 5
            assert correlation(a, b[np.arange(ROWS) ^ shift]) < 5


def test_each_bit_of_the_input_flips_half_of_the_output():
    """Avalanche of the mixer: every output bit flips with probability 1/2 +- 2 %."""
    x = np.random.default_rng(0).integers(0, 2**32, 50_000, np.uint32)
    mixed = np.asarray(_mix(jnp.asarray(x)))
    for bit in range(32):
        flipped = mixed ^ np.asarray(_mix(jnp.asarray(x ^ np.uint32(1 << bit))))
        share = [((flipped >> out) & 1).mean() for out in range(32)]
        assert np.abs(np.array(share) - 0.5).max() < 0.02, bit


def test_keys_that_differ_in_one_bit_are_independent():
    """Keys are used as given, too: raw words, and the four words of the generator rbg."""
    for impl, n in (("threefry2x32", 2), ("rbg", 4)):
        words = np.arange(1, n + 1, dtype=np.uint32)
        key = lambda w: jax.random.wrap_key_data(jnp.asarray(w), impl=impl)  # noqa: E731, B023
        a = np.asarray(dropped((ROWS, WIDTH), key(words)))
        for word in range(n):
            for bit in (0, 1, 7, 31):
                other = words.copy()
                other[word] ^= np.uint32(1 << bit)
                b = np.asarray(dropped((ROWS, WIDTH), key(other)))
                assert correlation(a, b) < 5
                assert correlation(a, b[np.arange(ROWS) ^ ((1 << bit) % ROWS)]) < 5


def test_scale_and_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)))
    y, pull = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(1)), x)
    kept = np.asarray(y) != 0
    np.testing.assert_allclose(y, np.where(kept, x / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], kept / 0.75, rtol=1e-6)
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(1)) is x


def test_a_key_per_sequence_gives_the_bits_of_that_sequence():
    keys = jax.random.split(jax.random.key(3), 4)
    together = np.asarray(dropped((4, 24, 8), fold(keys, 9)))
    for key, want in zip(keys, together, strict=True):
        np.testing.assert_array_equal(dropped((24, 8), fold(key, 9)), want)


def test_a_part_has_the_bits_of_the_complete_sequences():
    keys = jax.random.split(jax.random.key(3), 2)
    complete = np.asarray(dropped((2, 24, 8), fold(keys, 9)))
    part = dropped((2, 8, 8), fold(PartKeys(keys, jnp.int32(8)), 9))
    np.testing.assert_array_equal(part, complete[:, 8:16])


@pytest.mark.parametrize("keys", ["one", "per sequence"])
def test_same_bits_on_a_mesh_without_communication(keys):
    """Split over three axes: no collective, and no array of bits larger than a device's part."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, P("a", "b", "c"))
    shape = (4, 16, 256)
    key = jax.random.key(5) if keys == "one" else jax.random.split(jax.random.key(5), 4)
    run = jax.jit(lambda x: dropout(x, RATE, key), out_shardings=place)
    x = jax.device_put(jnp.ones(shape), place)
    text = run.lower(x).compile().as_text()
    assert not any(f"{kind}(" in text for kind in ("all-gather", "all-reduce", "all-to-all"))
    assert "[2,8,128]" in text and "4,16,256" not in text
    np.testing.assert_array_equal(np.asarray(run(x)) == 0, dropped(shape, key))


def test_the_backward_pass_stores_no_bits():
    """Its residuals are the key's words, not an array of the size of x."""
    f = jax.jit(lambda x: jax.vjp(lambda x: dropout(x, RATE, jax.random.key(0)), x)[1])
    residuals = jax.tree.leaves(jax.eval_shape(f, jax.ShapeDtypeStruct((64, 64), jnp.float32)))
    assert [leaf.size for leaf in residuals] == [2]
