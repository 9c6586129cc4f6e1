"""One pair: the folded weights do what layer and norm did, by a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subjects import in_turn

import jaxnorm
from jaxnorm.tools.folding.fold_pair import fold_pair

EPSILON = 1e-3

# equation of the layer, shape of its input and kernel, the kernel's output axes, the norm's shape
LAYERS = {
    "dense": ("ni,io->no", (7, 3), (3, 4), -1, (4,)),
    "transposed kernel": ("ni,koi->nko", (7, 3), (2, 4, 3), (0, 1), (1, 4)),
    "two feature axes": ("ni,iab->nab", (7, 3), (3, 4, 5), (1, 2), (4, 5)),
    "the norm's is one of two": ("ni,iab->nab", (7, 3), (3, 4, 5), (-2, -1), (1, 5)),
    "in another order": ("ni,iab->nba", (7, 3), (3, 4, 5), (2, 1), (5, 4)),
    "a batch axis": ("bni,bio->bno", (2, 7, 3), (2, 3, 4), (0, 2), (2, 4)),
}


def drawn(*shape, seed=0, **_):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def lay(value, equation, kernel_axes, ndim):
    """A value of features along the output: by the letters of the kernel's axes."""
    _, kernel, out = equation.replace("->", ",").split(",")
    letters = [kernel[axis] for axis in np.atleast_1d(kernel_axes)]
    assert [letter for letter in out if letter in letters] == letters
    shape = [1] * ndim
    for letter, size in zip(letters, value.shape, strict=True):
        shape[out.index(letter)] = size
    return value.reshape(shape)


def oracle(x, kernel, bias, mean, var, scale, offset, equation, axes):
    """Layer, then norm, in float64."""
    y = np.einsum(equation, x, kernel)

    def along(value):
        return lay(np.asarray(value, np.float64), equation, axes, y.ndim)

    y = y if bias is None else y + along(bias)
    y = (y - along(mean)) / np.sqrt(along(var) + EPSILON)
    y = y if scale is None else y * along(scale)
    return y if offset is None else y + along(offset)


def arrays_of(kind):
    _equation, x_shape, kernel_shape, axes, norm_shape = LAYERS[kind]
    features = tuple(kernel_shape[axis] for axis in np.atleast_1d(axes))
    return dict(
        x=drawn(*x_shape),
        kernel=drawn(*kernel_shape, seed=1),
        bias=drawn(*features, seed=2),
        mean=drawn(*norm_shape, seed=3),
        var=np.exp(drawn(*norm_shape, seed=4)),
        scale=drawn(*norm_shape, seed=5),
        offset=drawn(*norm_shape, seed=6),
    )


ABSENT = ((), ("bias",), ("scale", "offset"), ("bias", "scale"))


@pytest.mark.parametrize(("kind", "absent"), in_turn(LAYERS, ABSENT))
def test_layer_and_norm_become_a_layer(kind, absent, x64, quick_compile):
    equation, _, _, axes, _ = LAYERS[kind]
    arrays = arrays_of(kind) | dict.fromkeys(absent)
    stats = jaxnorm.Stats(jnp.asarray(arrays["mean"]), jnp.asarray(arrays["var"]))
    kernel, bias = fold_pair(
        jnp.asarray(arrays["kernel"]),
        arrays["bias"],
        stats,
        arrays["scale"],
        arrays["offset"],
        epsilon=EPSILON,
        output_axes=axes,
    )
    expected = oracle(**arrays, equation=equation, axes=axes)
    found = np.einsum(equation, arrays["x"], kernel)
    found = found + lay(np.asarray(bias), equation, axes, found.ndim)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("quick_compile")
def test_without_a_mean():
    kernel, bias = fold_pair(jnp.eye(2), None, jaxnorm.Stats(None, jnp.full(2, 4.0)), epsilon=0.0)
    assert kernel.tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert bias.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_mean_of_ten_thousand_deviations(has_bias):
    """Weights and bias are right to their last digits, also where bias and mean cancel."""
    kernel = drawn(27, 3).astype(np.float32)
    std = np.float32([0.1, 1.0, 10.0])
    mean = np.float32(1e4) * std
    given = mean + std if has_bias else None
    new, folded = fold_pair(kernel, given, jaxnorm.Stats(mean, std**2), epsilon=0.0)
    exact = np.sqrt((std**2).astype(np.float64))
    np.testing.assert_allclose(new, kernel / exact, rtol=3e-7)
    left = (given - mean if has_bias else -mean).astype(np.float64)
    np.testing.assert_allclose(folded, left / exact, rtol=3e-7)


def test_rounds_once_to_the_dtypes_of_the_layer():
    stats = jaxnorm.Stats(jnp.full(2, 0.3), jnp.full(2, 1.7))
    wide = fold_pair(jnp.full((1, 2), 0.7), jnp.full(2, 0.2), stats)
    narrow = fold_pair(jnp.full((1, 2), 0.7, jnp.bfloat16), jnp.full(2, 0.2), stats)
    assert narrow[0].dtype == jnp.bfloat16
    assert narrow[1].dtype == jnp.float32
    exact = float(jnp.float32(jnp.bfloat16(0.7))) / np.sqrt(1.7 + 1e-5)
    assert narrow[0][0, 0] == jnp.bfloat16(exact)
    np.testing.assert_array_equal(narrow[1], wide[1])
    assert fold_pair(jnp.ones((1, 2), jnp.float16), None, stats)[1].dtype == jnp.float16


def test_complex_layers(quick_compile):
    mean, scale = jnp.array([1.0 + 2.0j]), jnp.array([2.0j])
    stats = jaxnorm.Stats(mean, jnp.array([4.0]))
    kernel, bias = fold_pair(jnp.array([[1.0 - 1.0j]]), None, stats, scale, epsilon=0.0)
    np.testing.assert_allclose(kernel, [[1.0 + 1.0j]], rtol=1e-6)
    np.testing.assert_allclose(bias, [2.0 - 1.0j], rtol=1e-6)


def test_traces_and_differentiates_under_strict_promotion():
    stats = jaxnorm.Stats(jnp.zeros(2), jnp.ones(2))

    @jax.jit
    @jax.grad
    def slope(scale):
        kernel, bias = fold_pair(jnp.ones((3, 2), jnp.bfloat16), None, stats, scale, epsilon=0.0)
        return kernel.astype(jnp.float32).sum() + bias.astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        np.testing.assert_allclose(slope(jnp.ones(2)), [3.0, 3.0])
