"""Which inputs kernels see as rows or as slabs; and that those hold the same numbers together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.core.kernels.layout import Layout, layout_of

# axes, shape, the axes of scale and bias (None where there are none), and what kernels see.
TABLE = {
    "layer": ((2,), (4, 3, 8), (2,), Layout((12, 8))),
    "layer of one axis": ((1,), (4, 8), (1,), Layout((4, 8))),
    "layer of two axes": ((1, 2), (4, 3, 8), (1, 2), Layout((4, 24))),
    "layer without parameters": ((2,), (4, 3, 8), None, Layout((12, 8))),
    "layer with an axis of size 1 before": ((3,), (4, 1, 3, 8), (3,), Layout((12, 8))),
    "layer with an axis of size 1 within": ((1, 3), (4, 3, 1, 8), (1, 2, 3), Layout((4, 24))),
    "layer of one example": ((1, 2), (1, 3, 8), (2,), None),
    "layer over space": ((1, 2, 3), (4, 3, 2, 8), (3,), Layout((4, 6, 8))),
    "layer over space, without parameters": ((1, 2, 3), (4, 3, 2, 8), None, Layout((4, 48))),
    "instance": ((1, 2), (4, 3, 2, 8), (3,), Layout((4, 6, 8), 8)),
    "instance without parameters": ((1, 2), (4, 3, 2, 8), None, Layout((4, 6, 8), 8)),
    "instance with an axis of size 1": ((1, 2), (4, 6, 1, 8), (3,), Layout((4, 6, 8), 8)),
    "instance of several videos": ((2, 3), (4, 5, 3, 2, 8), (4,), Layout((20, 6, 8), 8)),
    "group": ((1, 2, 4), (4, 3, 2, 4, 2), (3, 4), Layout((4, 6, 8), 4)),
    "group without parameters": ((1, 2, 4), (4, 3, 2, 4, 2), None, Layout((4, 6, 8), 4)),
    "group of features alone": ((2,), (4, 4, 2), (1, 2), Layout((4, 1, 8), 4)),
    "group of one feature each": ((1, 3), (4, 3, 8, 1), (2, 3), Layout((4, 3, 8), 8)),
    "one group": ((1, 3), (4, 3, 1, 8), (2, 3), Layout((4, 3, 8))),
    "layer, channels first": ((1,), (4, 8, 3), (1,), None),
    "instance, channels first": ((2,), (4, 8, 3), (1,), None),
    "group, channels first": ((2, 3), (4, 4, 2, 3), (1, 2), None),
    "features between what is reduced": ((1, 3), (4, 3, 5, 8), (3,), None),
    "parameters of an axis before the last": ((2,), (4, 3, 8), (1,), None),
    "nothing": ((1,), (0, 8), (1,), None),
    "nothing to normalize": ((1,), (4, 0), (1,), None),
}


def seen(axes, shape, params):
    """By kernels, of an input with a scale and a bias along these axes."""
    if params is None:
        return layout_of(axes, shape)
    along = jax.ShapeDtypeStruct(
        [size if axis in params else 1 for axis, size in enumerate(shape)], jnp.float32
    )
    return layout_of(axes, shape, along, along)


@pytest.mark.parametrize("name", TABLE)
def test_layouts(name):
    *given, expected = TABLE[name]
    assert seen(*given) == expected


KEPT = {
    "layer": (4, 3, 8),
    "layer of two axes": (4, 24),
    "layer with an axis of size 1 before": (4, 1, 3, 8),
    "layer with an axis of size 1 within": (4, 24),
    "instance": (4, 3, 2, 8),
    "instance with an axis of size 1": (4, 6, 1, 8),
    "instance of several videos": (20, 3, 2, 8),
    "group": (4, 3, 2, 8),
    "group of features alone": (4, 1, 8),
    "group of one feature each": (4, 3, 8),
    "layer over space": (4, 3, 2, 8),
}


@pytest.mark.parametrize("name", KEPT)
def test_axes_of_rows_and_positions_can_be_kept(name):
    axes, shape, params, _ = TABLE[name]
    assert seen(axes, shape, params).keeping_axes(shape) == KEPT[name]


def test_scale_and_bias_along_different_axes():
    wide, narrow = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 8), (1, 1, 8)))
    assert layout_of((1, 2), (4, 3, 8), wide, wide) == Layout((4, 24))
    assert layout_of((1, 2), (4, 3, 8), wide, narrow) is None
    assert layout_of((2,), (4, 3, 8), narrow, None) == layout_of((2,), (4, 3, 8), None, narrow)


def subsets(axes):
    return [some for n in range(1, len(axes) + 1) for some in itertools.combinations(axes, n)]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 3, 4), (2, 1, 3, 2), (2, 3, 2, 2)])
def test_a_layout_groups_the_same_numbers(shape):
    """For all axes and parameters that there are: moments and products by either view agree."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    found = 0
    for axes, params in itertools.product(
        subsets(range(len(shape))), [None, *subsets(range(len(shape)))]
    ):
        layout = seen(axes, shape, params)
        if layout is None:
            continue
        found += 1
        rows = layout.shape[0]
        grouped = x.reshape(rows, -1, layout.groups, layout.shape[-1] // layout.groups)
        np.testing.assert_allclose(grouped.mean((1, 3)).ravel(), x.mean(axes).ravel())
        if params is not None:
            scale = rng.normal(size=[n if a in params else 1 for a, n in enumerate(shape)])
            by_kernel = x.reshape(layout.shape) * scale.reshape(-1)
            np.testing.assert_array_equal(by_kernel.reshape(shape), x * scale)
    assert found
