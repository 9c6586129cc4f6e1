"""Where `jaxnorm`'s layer, RMS, group and instance norm differ from Flax's, all on purpose.

Each test shows both behaviours.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, draw
from oracles import scaled, standardized
from row_norms import (
    ALL,
    BOTH,
    DY,
    FLAX,
    MASK,
    NORMS,
    OURS,
    REDUCED,
    SHAPE,
    WITH_FEATURE_AXES,
    X,
    both_layers,
    first_output,
    one_layer,
    options_of,
    output,
    plain_oracle,
    without_parameters,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

WITH_MEAN = pytest.mark.parametrize("norm", [name for name in NORMS if name != "RMSNorm"])


@WITH_MEAN
@BOTH
def test_variance_keeps_its_digits_far_from_zero(framework, norm):
    """Flax takes E[x^2] - E[x]^2, which rounds to noise here."""
    x = np.random.default_rng(0).normal(1e4, 1.0, SHAPE).astype(np.float32)
    layers = both_layers(framework, norm, x, **without_parameters(norm))
    flaxs, ours = (output(layer, x) for layer in layers)
    # Not closer: the mean itself is rounded to float32.
    limit = np.spacing(np.float32(1e4))
    np.testing.assert_allclose(ours, plain_oracle(norm, x), rtol=limit, atol=limit)
    assert np.abs(flaxs - plain_oracle(norm, x)).max() > 0.1


@ALL
@BOTH
def test_an_example_without_valid_elements_does_no_harm(framework, norm):
    """In Flax it is NaN, and so are the gradients of the parameters."""
    mask = MASK.at[0].set(False)

    layers = both_layers(framework, norm, epsilon=0.5)

    @jax.jit
    def run(params):
        def loss(params, x, layer):
            y, _ = layer.train(params, {}, x, mask=mask)
            return (y * DY).sum(), y

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return [grad(params, X, layer) for layer in layers]

    params = layers[1].params
    ((nan, _), flaxs), (gradients, ours) = run(params)
    chex.assert_tree_all_finite(gradients)
    assert_close(ours[0], scaled(X[0] / np.sqrt(1.5), params).astype(jnp.float32))
    assert_close(ours[1], flaxs[1])
    assert np.isnan(flaxs[0]).all()
    assert np.isnan(nan["scale"]).all()


@BOTH
def test_masks_of_group_norm_may_have_size_one_along_the_features(framework):
    """Flax splits the mask's features into groups, however many it has."""
    flaxs, ours = both_layers(framework, "GroupNorm", num_groups=2)
    mask = MASK[..., :1]
    assert_close(output(ours, mask=mask), output(flaxs, mask=jnp.broadcast_to(mask, SHAPE)))
    with pytest.raises(TypeError, match="cannot reshape"):
        output(flaxs, mask=mask)


@pytest.mark.parametrize("axes", [(2, 3), (1, -1)], ids=str)
def test_group_norm_of_nnx_with_other_reduction_axes_is_that_of_linen(axes):
    """NNX Flax lays the statistics along the wrong axis."""
    options = dict(num_groups=2, reduction_axes=axes, use_fast_variance=False)
    linen = one_layer(FLAX, "linen", "GroupNorm", **options)
    flaxs, ours = both_layers("nnx", "GroupNorm", **options)
    expected, _ = linen.train(ours.params, {}, X)
    assert_close(output(ours), expected)
    assert np.abs(output(flaxs) - expected).max() > 0.1


def test_group_norm_of_nnx_refuses_axes_without_the_feature_axis():
    """As both do in Linen; NNX Flax takes the last axis for it, and so leaves out a spatial one."""

    def run(library, *axes):
        return first_output(library, "nnx", "GroupNorm", num_groups=2, reduction_axes=axes)

    with pytest.raises(ValueError, match=r"reduction_axes=\(1, 2, 3\)"):
        run(OURS, 1, 2)
    np.testing.assert_array_equal(run(FLAX, 1, 2), run(FLAX, 1, -1))


@ALL
def test_bfloat16_result_does_not_round_the_input_in_nnx(norm):
    """NNX Flax with dtype=bfloat16 casts it before it computes; Linen Flax does not."""
    x = X + 100
    options = without_parameters(norm) | {"dtype": jnp.bfloat16}
    flaxs, ours = both_layers("nnx", norm, x, **options)
    exact = plain_oracle(norm, x)

    def roundings(layer):
        """The greatest error, in roundings of the exact result to bfloat16."""
        error = np.abs(output(layer, x).astype(jnp.float32) - exact)
        return (error / (np.abs(exact) * float(jnp.finfo(jnp.bfloat16).eps) / 2 + 1e-4)).max()

    assert roundings(ours) < 1.01
    assert roundings(one_layer(FLAX, "linen", norm, x, **options)) < 2
    assert roundings(flaxs) > 1.3


@WITH_FEATURE_AXES
def test_several_feature_axes_of_nnx_are_those_of_linen(norm):
    """NNX Flax takes one number of features only, which may be a product of sizes, as in ours."""
    options = options_of(norm, feature_axes=(-1, 1), use_fast_variance=False)
    linen = one_layer(FLAX, "linen", norm, **options)
    ours = one_layer(OURS, "nnx", norm, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours.params, linen.params)
    expected, _ = linen.train(ours.params, {}, X)
    assert_close(output(ours), expected)
    with pytest.raises(TypeError):
        one_layer(FLAX, "nnx", norm, **options)
    flat = (first_output(library, "nnx", norm, features=32, **options) for library in (OURS, FLAX))
    assert_close(*flat)


@ALL
def test_a_wrong_number_of_features_is_a_value_error(norm):
    """NNX Flax fails to reshape, or, where it has no parameters to reshape, may go on."""
    with pytest.raises(TypeError, match="cannot reshape"):
        first_output(FLAX, "nnx", norm, features=6, **options_of(norm))
    bare = options_of(norm) | without_parameters(norm)
    if norm != "GroupNorm":
        first_output(FLAX, "nnx", norm, features=6, **bare)
    for options in (options_of(norm), bare):
        with pytest.raises(ValueError, match="num_features=8"):
            first_output(OURS, "nnx", norm, features=6, **options)


@ALL
def test_mapped_axes_need_not_exist_while_initializing(norm):
    """NNX has no first call, and Flax's BatchNorm does the same."""
    options = options_of(norm, axis_name="unbound")
    with pytest.raises(NameError):
        first_output(FLAX, "linen", norm, **options)
    assert first_output(OURS, "linen", norm, **options).shape == SHAPE
    for library in (FLAX, OURS):
        assert getattr(library["nnx"], norm)(8, rngs=nnx.Rngs(0), **options).axis_name == "unbound"


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@ALL
@BOTH
def test_devices_weigh_by_their_valid_elements(framework, norm, masked):
    """Flax averages the statistics of devices, however many elements each has under its mask."""
    mask = MASK if masked else jnp.ones(SHAPE, bool)
    # The first axis is mapped and reduced as well; the second is then that of examples.
    axes = tuple(sorted({0, *REDUCED[norm]} - {1}))
    use_mean = norm != "RMSNorm"
    expected = standardized(X, axes, where=mask, epsilon=1e-6, use_mean=use_mean)

    def run(library):
        options = options_of(norm) | without_parameters(norm) | {"axis_name": "parts"}
        cls = getattr(library[framework], norm)

        def one_device(x, mask):
            if framework == "linen":
                return cls(**options).apply({}, x, mask=mask)
            return cls(8, rngs=None, **options)(x, mask=mask)

        return jax.jit(jax.vmap(one_device, axis_name="parts"))(X, mask)

    np.testing.assert_allclose(run(OURS), expected, rtol=1e-5, atol=1e-5)
    assert (np.abs(run(FLAX) - expected).max() > 0.01) == masked


@ALL
@BOTH
def test_a_mask_that_fits_in_two_ways_is_refused(framework, norm):
    """Flax takes a mask [batch, time] for one of [time, features] where the sizes agree."""
    x, mask = draw((4, 4, 4)), MASK[0, :, :, 0]
    flaxs, ours = both_layers(framework, norm, x)
    with jax.numpy_rank_promotion("allow"):
        found = output(flaxs, x, mask=mask)
    assert_close(found, output(ours, x, mask=jnp.broadcast_to(mask, x.shape)))
    with pytest.raises(ValueError, match=r"mask\[\.\.\., None\]"):
        output(ours, x, mask=mask)


@pytest.mark.filterwarnings("ignore:Casting")
@ALL
@BOTH
def test_complex_input_is_not_made_real(framework, norm):
    """With dtype=float32 Flax drops the imaginary part."""
    x = draw(SHAPE, jnp.complex64)

    def run(library):
        return output(one_layer(library, framework, norm, x, dtype=jnp.float32), x)

    assert run(FLAX).dtype == jnp.float32
    with pytest.raises(TypeError, match="imaginary part"):
        run(OURS)
