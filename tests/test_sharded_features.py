"""Features on several devices: the answer is that on one, in value and every gradient.

Layer, RMS and group norm reduce along the axis that is spread; group norm, whitening and IBN also
divide it, at places that need not be those between devices.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modules import draw, draw_mask
from oracles import of_group_norm, standardized
from subjects import SUBJECTS

import jaxnorm
from jaxnorm.diagnose import collectives

pytestmark = pytest.mark.usefixtures("quick_compile")
DEVICES = 8
SHAPE = (3, 5, 16)
ALONG = P(None, None, "d")
LIMITS = {jnp.float32: dict(rtol=2e-5, atol=2e-5), jnp.bfloat16: dict(rtol=2**-6, atol=2**-6)}
MASKS = {"no mask": None, "of tokens": (*SHAPE[:-1], 1), "of elements": SHAPE}


def rms_norm(x, scale, bias, **options):
    return jaxnorm.affine(jaxnorm.rms_norm(x, scale, **options), bias=bias)


def group_norm(groups, x, scale, bias, **options):
    return jaxnorm.group_norm(x, scale, bias, num_groups=groups, **options)


# The function on one device; and on each of several, where only a part of the features is.
NORMS = {
    "layer norm": (jaxnorm.layer_norm, partial(jaxnorm.layer_norm, axis_name="d")),
    "RMS norm": (rms_norm, partial(rms_norm, axis_name="d")),
    "groups on one device each": (partial(group_norm, 8), partial(group_norm, 1)),
    "groups on two devices each": (
        partial(group_norm, 4),
        partial(
            group_norm, 1, axis_name="d", axis_index_groups=[[i, i + 1] for i in range(0, 8, 2)]
        ),
    ),
}


def mesh_of(kind, sizes=(DEVICES,), names=("d",)):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def place(mesh, arrays, specs):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), arrays, specs)


def along_features(array):
    """The spec of an array whose last axis is that of features, or of size 1."""
    return P(*[None] * (array.ndim - 1), "d" if array.shape[-1] > 1 else None)


def by_jit(kind, norm, x, scale, bias, mask):
    mesh = mesh_of(kind)
    arrays = [a for a in (x, scale, bias, mask) if a is not None]
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, [along_features(a) for a in arrays])
        found = jax.jit(partial(everything, norm[0]))(*placed)
    if kind is AxisType.Explicit:
        assert all(leaf.sharding.spec == along_features(leaf) for leaf in found)
    return found


def by_shard_map(check_vma, norm, x, scale, bias, mask):
    arrays = [a for a in (x, scale, bias, mask) if a is not None]

    def local(x, scale, bias, mask=None):
        return norm[1](x, scale, bias, where=mask)

    sharded = jax.shard_map(
        local,
        mesh=mesh_of(AxisType.Auto),
        in_specs=tuple(along_features(a) for a in arrays),
        out_specs=ALONG,
        check_vma=check_vma,
    )

    def whole(x, scale, bias, where):
        return sharded(x, scale, bias, *([] if where is None else [where]))

    return jax.jit(partial(everything, whole))(*arrays)


def everything(norm, x, scale, bias, mask=None):
    """Result, and gradients of a loss of it."""

    def loss(x, scale, bias):
        y = norm(x, scale, bias, where=mask)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    gradients, y = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return y, *gradients


CONTEXTS = {
    "jit, auto": partial(by_jit, AxisType.Auto),
    "jit, explicit": partial(by_jit, AxisType.Explicit),
    "shard_map": partial(by_shard_map, True),
    "shard_map unchecked": partial(by_shard_map, False),
}
EACH_CONTEXT = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
EACH_NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


def numpys(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


@pytest.mark.parametrize("dtype", LIMITS)
@EACH_NORM
@EACH_CONTEXT
def test_the_answer_is_that_on_one_device(context, norm, dtype):
    for mask in MASKS.values() if dtype is jnp.float32 else [None]:
        where = None if mask is None else draw_mask(mask)
        arrays = draw(SHAPE, dtype), draw((16,), seed=1), draw((16,), seed=2), where
        expected = everything(norm[0], *arrays)
        found = context(norm, *arrays)
        assert [leaf.dtype for leaf in found] == [leaf.dtype for leaf in expected]
        chex.assert_trees_all_close(numpys(found), numpys(expected), **LIMITS[dtype])


@EACH_CONTEXT
@pytest.mark.parametrize("name", ["layer norm", *list(NORMS)[2:]])
def test_means_of_many_standard_deviations(context, name):
    """Not closer than the rounding of a mean in float32."""
    x = np.random.default_rng(0).normal(1e4, 1.0, SHAPE).astype(np.float32)
    one, zero = jnp.ones(16), jnp.zeros(16)
    y, *_ = context(NORMS[name], jnp.asarray(x), one, zero, None)
    if name == "layer norm":
        expected = standardized(x, (-1,), epsilon=1e-6)
    else:
        expected = of_group_norm(x, {}, num_groups=NORMS[name][0].args[0])
    limit = float(np.spacing(np.float32(1e4)))
    np.testing.assert_allclose(y, expected, rtol=limit, atol=limit)


# Groups that are cut by devices, which explicit mesh axes have no type for.

X = draw((4, 4, 2, 16))
MASK = draw_mask((4, 4, 2, 1))
CUT = {
    "group_norm": lambda x, m: jaxnorm.group_norm(x, num_groups=4, where=m),
    "one group": lambda x, m: jaxnorm.group_norm(x, num_groups=1, where=m),
    "scaled group_norm": lambda x, m: jaxnorm.group_norm(
        x, jnp.arange(16.0), jnp.ones(16), num_groups=2, where=m
    ),
    "comoments": lambda x, m: jaxnorm.comoments(x, num_groups=4, where=m),
    "decorrelated_batch_norm": lambda x, m: jaxnorm.decorrelated_batch_norm(
        x, num_groups=4, where=m
    ),
    "iter_norm": lambda x, m: jaxnorm.iter_norm(x, num_groups=4, where=m, n_steps=2),
    "whiten": lambda x, m: jaxnorm.whiten(x, jaxnorm.comoments(X, num_groups=4).stats()),
    "ibn_a": lambda x, m: jaxnorm.ibn_a(x, ratio=0.25, where=m),
    "ibn_a_inference": lambda x, m: jaxnorm.ibn_a_inference(
        x, jaxnorm.Stats(jnp.ones(12), jnp.ones(12)), ratio=0.25, where=m
    ),
}
PLACES = {
    "eight devices": ((DEVICES,), ("d",), P(None, None, None, "d")),
    "beside data": ((2, 4), ("b", "d"), P("b", None, None, "d")),
    "two axes": ((2, 4), ("a", "d"), P(None, None, None, ("a", "d"))),
}


def value_and_gradient(function, x, mask):
    def loss(x):
        result = function(x, mask)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(result)), result

    gradient, result = jax.grad(loss, has_aux=True)(x)
    return result, gradient


@pytest.mark.parametrize(
    ("name", "place_of", "kind"),
    [
        *((name, "eight devices", AxisType.Explicit) for name in CUT),
        *((name, "eight devices", AxisType.Auto) for name in ("group_norm", "iter_norm", "ibn_a")),
        *(
            (name, place_of, AxisType.Explicit)
            for name in ("group_norm", "iter_norm")
            for place_of in ("beside data", "two axes")
        ),
    ],
    ids=str,
)
def test_groups_on_more_devices(name, place_of, kind):
    sizes, names, spec = PLACES[place_of]
    step = jax.jit(partial(value_and_gradient, CUT[name]))
    expected = step(X, MASK)
    mesh = mesh_of(kind, sizes, names)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        found = step(x, MASK)
    limits = dict(rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(numpys(found), numpys(expected), **limits)
    if kind is AxisType.Explicit:
        result, gradient = found
        assert gradient.sharding.spec == spec
        if name != "comoments":
            y = result[0] if isinstance(result, tuple) else result
            assert y.sharding.spec == spec


def test_cut_groups_move_no_features():
    """Only sums travel: far less than the features themselves."""
    mesh = mesh_of(AxisType.Explicit)
    x = draw((4, 16, 16, 16))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(None, None, None, "d")))
        step = jax.jit(partial(value_and_gradient, CUT["group_norm"]))
        traffic = collectives(step.lower(placed, None).compile())
    assert sum(collective.bytes for collective in traffic) < x.nbytes / DEVICES / 8


@pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS if subject.name in ("GroupNorm", "IterNorm", "IBNa")],
    ids=lambda subject: subject.name,
)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layers_with_cut_groups(framework, subject):
    """Training, running statistics and inference, on an explicit mesh."""
    x, mask = subject.input(), subject.some_mask()
    layer = subject.layer(framework, x)

    @jax.jit
    def run(params, stats, x):
        y, new = layer.train(params, stats, x, mask=mask)
        return y, new, layer.infer(params, new, x)

    expected = run(layer.params, layer.stats, x)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        spec = P(*[None] * (x.ndim - 1), "d")
        found = run(layer.params, layer.stats, jax.device_put(x, NamedSharding(mesh, spec)))
    assert found[0].sharding.spec == spec
    chex.assert_trees_all_close(numpys(found), numpys(expected), rtol=1e-4, atol=1e-4)
