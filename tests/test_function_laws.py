"""Laws that every pure function obeys, with options that layers of `test_laws.py` do not give."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_along_a_line
from functions import FUNCTIONS
from modules import draw, draw_mask, draw_weights

import jaxnorm

QUICK = pytest.mark.usefixtures("quick_compile")
WIDE = pytest.mark.usefixtures("x64", "quick_compile")
EACH = pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)
DEVICES = 8
GROUPS = [[0, 3], [1, 2, 4, 5], [6], [7]]


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def arguments(row, dtype=jnp.float64):
    """Input, scale and bias: float32 numbers, of which none is small."""
    x = draw(row.shape)
    scale = None if row.features is None else 1 + 0.3 * draw(row.features, seed=1)
    bias = draw(row.features, seed=2) if row.bias else None
    return [None if a is None else a.astype(dtype) for a in (x, scale, bias)]


def weights_of(row):
    """With an example of which nothing is valid; None for a function without masks."""
    return None if row.mask is None else draw_weights(row.mask).at[1].set(0)


def by_oracle(row, *arrays):
    return row.oracle(*(None if a is None else np.asarray(a, np.float64) for a in arrays))


@WIDE
@EACH
def test_functions_are_what_the_papers_say(row):
    x, scale, bias = arguments(row)
    masks = None
    if row.mask is not None:
        masks = jnp.stack([weights_of(row), draw_mask(row.mask), jnp.zeros(row.mask)])

    @jax.jit
    def run(x, scale, bias, masks):
        masked = [] if masks is None else jax.lax.map(lambda w: row.ours(x, scale, bias, w), masks)
        return row.ours(x, scale, bias), row.ours(x, None, None), masked

    whole, bare, masked = run(x, scale, bias, masks)
    close = dict(rtol=row.rtol, atol=row.rtol)
    np.testing.assert_allclose(whole, by_oracle(row, x, scale, bias, None), **close)
    np.testing.assert_allclose(bare, by_oracle(row, x, None, None, None), **close)
    for found, mask in zip(masked, () if masks is None else masks, strict=True):
        np.testing.assert_allclose(found, by_oracle(row, x, scale, bias, mask), **close)


@WIDE
@EACH
def test_only_the_result_is_rounded(row):
    """To the dtype of the input, or the one asked for; integers count as float32."""
    x, scale, bias = arguments(row, jnp.float32)
    narrow, whole = x.astype(jnp.bfloat16), jnp.rint(4 * x).astype(jnp.int8)
    bias = None if bias is None else bias.astype(jnp.bfloat16)
    where = None if row.mask is None else draw_mask(row.mask)

    @jax.jit
    def run(x, scale, bias, where, whole):
        return (
            row.ours(x, scale, bias, where),
            row.ours(x, scale, bias, where, dtype=jnp.float64),
            row.ours(whole, scale, bias, where),
            row.ours(whole.astype(jnp.float32), scale, bias, where),
        )

    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        found, wide, of_integers, of_floats = run(narrow, scale, bias, where, whole)
    assert (found.dtype, wide.dtype) == (jnp.bfloat16, jnp.float64)
    expected = by_oracle(row, narrow, scale, bias, where)
    limit = 0.51 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(found.astype(jnp.float64), expected, rtol=limit, atol=3e-5)
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=3e-5)
    chex.assert_trees_all_equal(of_integers, of_floats, strict=True)


@EACH
def test_right_at_large_means(row):
    """At a mean of 1e4 standard deviations, in float32."""
    x = draw(row.shape) + 1.5e4
    expected = by_oracle(row, x, None, None, None)
    # In inference the mean is far from the running one, and so is the result.
    size = abs(expected).max()
    found = jax.jit(lambda x: row.ours(x, None, None))(x)
    np.testing.assert_allclose(found, expected, atol=2e-3 * size)


@WIDE
@each([row for row in FUNCTIONS if not row.layer])
def test_derivatives_of_two_orders(row):
    """Along a line through all arguments, in both modes, and by finite differences."""
    given, where = arguments(row), weights_of(row)
    direction = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), given)
    weights = draw(row.shape, jnp.float64, seed=5)

    def along(t):
        moved = jax.tree.map(lambda a, d: a + t * d, given, direction)
        return (weights * jnp.sin(row.ours(*moved, where))).sum()

    @jax.jit
    def orders(t):
        forward, reverse = jax.jacfwd(along), jax.grad(along)
        ways = jax.jacfwd(reverse), jax.grad(reverse), jax.jacfwd(forward)
        return along(t), (forward(t), reverse(t)), [way(t) for way in ways]

    check_along_a_line(orders)


@WIDE
@each([row for row in FUNCTIONS if row.pools])
def test_groups_of_devices_are_batches_of_their_own(row):
    """Also where a device, or a group of one, has nothing valid."""
    _, scale, bias = arguments(row)
    x = draw((DEVICES, *row.shape[1:]), jnp.float64)
    where = draw_weights((DEVICES, *row.mask[1:])).at[jnp.array([2, 6])].set(0)

    def local(x, where):
        options = dict(axis_name="d", axis_index_groups=GROUPS)
        return row.ours(x, scale, bias, where, **options)

    y = jax.jit(jax.vmap(local, axis_name="d"))(x[:, None], where[:, None])[:, 0]
    for group in map(np.asarray, GROUPS):
        expected = by_oracle(row, x[group], scale, bias, where[group])
        np.testing.assert_allclose(y[group], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", [n for n, value in vars(jaxnorm).items() if inspect.isfunction(value) and n[0] != "_"]
)
def test_every_argument_is_documented(name):
    function = getattr(jaxnorm, name)
    for parameter in inspect.signature(function).parameters:
        assert parameter in (function.__doc__ or ""), parameter
