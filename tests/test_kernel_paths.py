"""A normalization by a kernel equals the specification, whatever JAX does with it.

Laws x cases. `never` is the specification, differentiated by its rule (tests/test_derivatives.py);
`always` puts a kernel in its place where it can be. What the kernels compute by themselves, and
what they cost, is in tests/test_kernels.py.

Tolerances are for float32: sums of some dozens of numbers in another order differ by a few units
in the last place, times how far a result is from its summands.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from subjects import in_turn
from test_kernels import closed_form

import jaxnorm
from jaxnorm.core.kernels import primitives, rows_cpu, rows_gpu, rows_tpu, slabs_tpu
from jaxnorm.core.kernels.choice import Choice
from jaxnorm.diagnose import collectives, norm_kernels

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]


class Case:
    """A normalization of an input of `shape` with parameters of `features`, in this order."""

    def __init__(self, function, shape, features, *given, kernel):
        self.function, self.shape, self.given, self.kernel = function, shape, given, kernel
        self.features = features

    def arrays(self, dtype=jnp.float32, offset=0.0):
        rng = np.random.default_rng(0)
        x = jnp.asarray(offset + rng.normal(size=self.shape), dtype)
        params = [1 + 0.3 * rng.normal(size=self.features) for _ in self.given]
        return x, *(jnp.asarray(one, jnp.float32) for one in params)

    def __call__(self, x, *params):
        return self.function(x, **dict(zip(self.given, params, strict=True)))


def instance(x, **params):
    return jaxnorm.instance_norm(x, **params)[0]


def batch(x, **params):
    return jaxnorm.batch_norm(x, **params)[0]


def with_evidence(x, **params):
    """The moments as well, whose tangents are not zero."""
    y, seen = jaxnorm.normalize(x, **params, axes=-1)
    return y + jnp.sin(seen.mean)[..., None] * seen.var[..., None] ** 2


def in_groups(x, **params):
    return jaxnorm.group_norm(x, **params, num_groups=3)


BOTH = "scale", "bias"
# Sixteen examples, so that each of eight devices has two.
TOKENS, IMAGES, ROWS, SLABS = (16, 5, 24), (16, 4, 5, 12), "rows", "slabs"
CASES = {
    "layer": Case(jaxnorm.layer_norm, TOKENS, 24, *BOTH, kernel=ROWS),
    "layer without parameters": Case(jaxnorm.layer_norm, TOKENS, 24, kernel=ROWS),
    "layer with bias": Case(jaxnorm.layer_norm, TOKENS, 24, "bias", kernel=ROWS),
    "layer of two axes": Case(
        partial(jaxnorm.layer_norm, axes=(1, 2), axis=(1, 2)), TOKENS, (5, 24), *BOTH, kernel=ROWS
    ),
    "layer and its evidence": Case(with_evidence, TOKENS, 24, *BOTH, kernel=ROWS),
    "rms": Case(jaxnorm.rms_norm, TOKENS, 24, "scale", kernel=ROWS),
    "rms without scale": Case(jaxnorm.rms_norm, TOKENS, 24, kernel=ROWS),
    "layer over space": Case(
        partial(jaxnorm.layer_norm, axes=(1, 2, 3)), IMAGES, 12, *BOTH, kernel=SLABS
    ),
    "group": Case(in_groups, IMAGES, 12, *BOTH, kernel=SLABS),
    "group without parameters": Case(in_groups, IMAGES, 12, kernel=SLABS),
    "group of features alone": Case(in_groups, (80, 12), 12, *BOTH, kernel=SLABS),
    "instance": Case(instance, IMAGES, 12, *BOTH, kernel=SLABS),
    "instance with scale": Case(instance, IMAGES, 12, "scale", kernel=SLABS),
    "batch": Case(batch, IMAGES, 12, *BOTH, kernel=None),
}
WITH_KERNELS = [name for name, case in CASES.items() if case.kernel]


def weighted(y):
    """A number in which every derivative of every element differs."""
    weights = np.random.default_rng(1).normal(size=y.shape)
    return (jnp.asarray(weights, jnp.float32) * jnp.sin(y.astype(jnp.float32))).sum()


def loss(function):
    return lambda *arrays: weighted(function(*arrays))


def direction(arrays):
    return tuple(jnp.cos(3 * one + 1).astype(one.dtype) for one in arrays)


def gradient(function, arrays):
    return jax.grad(function, tuple(range(len(arrays))))


def pushed(function, arrays):
    """The value and its tangent."""
    return jax.jvp(function, arrays, direction(arrays))


def several(arrays):
    return [jnp.stack([one, jnp.sin(one), 2 * one]) for one in arrays]


def scanned(function, arrays):
    """Three normalizations in turn, each of the result of the one before."""
    x, *params = arrays

    def loss(x, *params):
        def step(x, param):
            return x + function(x, *param).astype(x.dtype), None

        return weighted(lax.scan(step, x, params, length=3)[0])

    return gradient(loss, arrays)(x, *several(params))


def linear(function, arrays):
    y, push = jax.linearize(function, *arrays)
    return y, push(*direction(arrays)), jax.linear_transpose(push, *arrays)(jnp.cos(y))


# What is done with a function of arrays.
LAWS = {
    "gradient for x": lambda f, a: jax.grad(loss(f))(*a),
    "gradient for the last": lambda f, a: jax.grad(loss(f), len(a) - 1)(*a),
    "jvp for x": lambda f, a: pushed(lambda x: f(x, *a[1:]), a[:1]),
    "gradient of gradient": lambda f, a: gradient(
        lambda *b: sum(weighted(one) for one in gradient(loss(f), a)(*b)), a
    )(*a),
    "jvp of gradient": lambda f, a: pushed(gradient(loss(f), a), a),
    "gradient of jvp": lambda f, a: gradient(lambda *b: weighted(pushed(f, b)[1]), a)(*a),
    "linearize": linear,
    "checkpoint": lambda f, a: gradient(loss(jax.checkpoint(f)), a)(*a),
    "scan": scanned,
    "vmap": lambda f, a: jax.vmap(f, (0, *[None] * (len(a) - 1)))(several(a)[0], *a[1:]),
    "vmap of gradient": lambda f, a: jax.vmap(gradient(loss(f), a), (0, *[None] * (len(a) - 1)))(
        several(a)[0], *a[1:]
    ),
    "gradient of vmap": lambda f, a: gradient(loss(jax.vmap(f, (0, *[None] * (len(a) - 1)))), a)(
        several(a)[0], *a[1:]
    ),
    "vmap of parameters too": lambda f, a: jax.vmap(gradient(loss(f), a))(*several(a)),
    "vmap along the last axis": lambda f, a: jax.vmap(f, (-1, *[None] * (len(a) - 1)), -1)(
        jnp.stack([a[0], jnp.sin(a[0])], -1), *a[1:]
    ),
    "vmap of jvp of gradient": lambda f, a: jax.vmap(
        lambda x: pushed(gradient(loss(f), a), (x, *a[1:]))
    )(several(a)[0]),
    "jit in jit": lambda f, a: jax.jit(gradient(loss(jax.jit(f)), a))(*a),
}


def run(use, law, function, arrays):
    """A law on a fresh function, since `jax.jit` keeps what it has traced."""
    with jaxnorm.use_kernels(use):
        return jax.jit(lambda *arrays: law(lambda *some: function(*some), arrays))(*arrays)


def agree(found, expected, tolerance):
    """Everything alike, up to `tolerance` of the largest number of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        np.testing.assert_allclose(one, other, 0, tolerance * (1e-6 + np.abs(other).max()))


def value_and_derivatives(function, arrays):
    """The value, the gradient, and its tangent, which has all second derivatives."""
    return function(*arrays), pushed(gradient(loss(function), arrays), arrays)


def by_both(law, case, arrays):
    found, expected = (run(use, law, case, arrays) for use in ("always", "never"))
    agree(found, expected, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_the_specification(name):
    by_both(value_and_derivatives, CASES[name], CASES[name].arrays())


@pytest.mark.parametrize("name", ["layer", "layer with bias", "rms"])
def test_rows_that_count_as_many(name, monkeypatch):
    monkeypatch.setattr(rows_cpu, "LARGE", 1)
    by_both(value_and_derivatives, CASES[name], CASES[name].arrays())


@pytest.mark.parametrize(("law", "name"), in_turn(LAWS, CASES))
def test_whatever_jax_does(law, name):
    by_both(LAWS[law], CASES[name], CASES[name].arrays())


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_there_is_a_kernel(name):
    case = CASES[name]
    with jaxnorm.use_kernels("always"):
        (found,) = norm_kernels(case, *case.arrays(), platform="cpu")
    assert found.kernel == f"{case.kernel}_cpu"


# Results are rounded once to their dtype, of the same float32 numbers but for their last places;
# so they differ by one unit of 8 or 11 bits, and gradients that are sums of them by less.
UNITS = {"bfloat16": 2**-7, "float16": 2**-10}


@pytest.mark.parametrize(("name", "dtype"), in_turn(["layer", "rms", "group", "instance"], UNITS))
def test_narrow_numbers(name, dtype):
    case = CASES[name]
    arrays = case.arrays(dtype)

    def law(function, arrays):
        return function(*arrays), gradient(loss(function), arrays)(*arrays)

    found, expected = (run(use, law, case, arrays) for use in ("always", "never"))
    agree(found, expected, UNITS[dtype])


MESH = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def sharded(check_vma):
    """Each device has two examples, and all of them the parameters."""

    def on_mesh(function, arrays):
        specs = (P("d"), *[P()] * (len(arrays) - 1))
        mapped = jax.shard_map(
            function, mesh=MESH, in_specs=specs, out_specs=P("d"), check_vma=check_vma
        )
        return value_and_derivatives(mapped, arrays)

    return on_mesh


@pytest.mark.parametrize(
    ("name", "check_vma"), in_turn(["layer", "rms", "group", "instance"], [True, False])
)
def test_in_shard_map(name, check_vma):
    case = CASES[name]
    arrays = case.arrays()
    found = run("always", sharded(check_vma), case, arrays)
    agree(found, run("never", value_and_derivatives, case, arrays), 2e-5)
    with jaxnorm.use_kernels("always"):
        report = norm_kernels(lambda *a: sharded(check_vma)(case, a), *arrays, devices=8)
    assert {one.kernel for one in report} == {f"{case.kernel}_cpu"}


@pytest.mark.parametrize("name", ["layer", "group"])
def test_in_pmap(name):
    case = CASES[name]
    x, *params = arrays = case.arrays()

    def mapped(x, *params):
        parts = x.reshape(8, 2, *x.shape[1:])
        y = jax.pmap(case, in_axes=(0, *[None] * len(params)))(parts, *params)
        return y.reshape(x.shape)

    with jaxnorm.use_kernels("always"):
        found = gradient(loss(mapped), arrays)(x, *params)
    agree(found, run("never", lambda f, a: gradient(loss(f), a)(*a), case, arrays), 2e-5)


@pytest.mark.parametrize("name", ["layer", "group"])
def test_a_program_that_the_compiler_divides_has_no_kernel(name):
    """It would gather x for it. As it is, no collective is added, and results are the same."""
    case = CASES[name]
    arrays = case.arrays()
    placed = [
        jax.device_put(one, NamedSharding(MESH, spec))
        for one, spec in zip(arrays, (P("d"), *[P()] * len(arrays)), strict=False)
    ]
    sent, found = {}, {}
    for use in ("always", "never"):
        with jaxnorm.use_kernels(use):
            step = jax.jit(lambda *a: gradient(loss(case), a)(*a)).lower(*placed).compile()
            sent[use], found[use] = collectives(step), step(*placed)
    agree(found["always"], found["never"], 2e-5)
    assert sent["always"] == sent["never"]
    assert {one.kind for one in sent["never"]} == {"all-reduce"}
    with jaxnorm.use_kernels("always"):
        (report,) = norm_kernels(case, *placed, devices=8)
    assert report.kernel is None


def interpreted(kernels):
    """A module of kernels for other devices, run here."""
    forward, backward = (
        partial(function, interpret=True) for function in (kernels.forward, kernels.backward)
    )
    return SimpleNamespace(
        KEEPS_AXES=False, forward=forward, backward=backward, __name__=kernels.__name__
    )


OTHERS = {
    "rows_tpu": (interpreted(rows_tpu), ("layer", "rms", "layer and its evidence")),
    "slabs_tpu": (interpreted(slabs_tpu), ("group", "instance with scale")),
    "rows_gpu": (interpreted(rows_gpu), ("layer", "rms without scale")),
}
OTHER_LAWS = {
    "value and derivatives": value_and_derivatives,
    "shard_map": sharded(check_vma=False),
    **{law: LAWS[law] for law in ("scan", "vmap of gradient", "gradient of vmap")},
}


PAIRS = {
    f"{kernel}, {name}": (kernel, name) for kernel, (_, names) in OTHERS.items() for name in names
}


def put_in_place(monkeypatch, kernel):
    """Has programs for CPUs take this kernel for all normalizations that it can be taken for."""
    form, _ = OTHERS[kernel]
    taken = []

    def choose(platform, plan, layout, *_):
        if layout is None or plan.kernels == "never":
            return Choice(None, "the specification")
        taken.append(layout)
        return Choice(form, "asked for by a test")

    monkeypatch.setattr(primitives, "choose", choose)
    return taken


@pytest.mark.parametrize(
    ("pair", "law"), in_turn(PAIRS, OTHER_LAWS, always=("value and derivatives",))
)
def test_kernels_of_other_devices(pair, law, monkeypatch):
    kernel, name = PAIRS[pair]
    taken = put_in_place(monkeypatch, kernel)
    case = CASES[name]
    arrays = case.arrays()
    if law == "shard_map":
        found = run("always", OTHER_LAWS[law], case, arrays)
        agree(found, run("never", value_and_derivatives, case, arrays), 2e-5)
    else:
        by_both(OTHER_LAWS[law], case, arrays)
    assert taken


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if name != "layer and its evidence"])
def test_derivatives_keep_no_array_but_the_input(name, dtype):
    case = CASES[name]
    x, *params = case.arrays(dtype)
    with jaxnorm.use_kernels("always"):
        program = jax.make_jaxpr(lambda x: jax.vjp(case, x, *params)[1])(x).jaxpr
    reshaped = {
        one.outvars[0]: one.invars[0] for one in program.eqns if str(one.primitive) == "reshape"
    }
    kept = [one for one in program.outvars if one.aval.size >= x.size]
    assert [reshaped.get(one, one) for one in kept] == program.invars


FAR = 1e4
FAR_CASES = ["layer", "rms", "layer over space", "group", "instance"]
FORMS = [
    *((name, form) for name in FAR_CASES for form in ("specification", "kernel for CPUs")),
    *((name, form) for name in FAR_CASES for form in OTHERS if form.startswith(CASES[name].kernel)),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_mean_of_ten_thousand_standard_deviations(name, form, monkeypatch):
    """Values and gradients against the closed form in float64."""
    if form in OTHERS:
        put_in_place(monkeypatch, form)
    use = "never" if form == "specification" else "always"
    case = CASES[name]
    x, *params = case.arrays(offset=FAR)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def both(function, arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(dy)

    found = run(use, both, case, (x, *params))
    slab = (-1, 1, 24) if case.kernel == ROWS else (16, 20, 12)
    groups = {"group": 3, "instance": 12}.get(name, 1)
    scale, bias = (*params, None)[:2]
    y, _, _, dx, dscale, dbias = closed_form(
        x.reshape(slab), scale, bias, dy.reshape(slab), groups, name != "rms"
    )
    expected = (y, dx, dscale, dbias)[: 1 + len(found[1:])]
    # The mean is a float32 as well, of which the spacing here is a thousandth of a deviation: by
    # so much of it do gradients see x shifted. The value takes off what is left of it.
    for one, right in zip(found, expected, strict=True):
        right = right.reshape(one.shape)
        np.testing.assert_allclose(one, right, 0, 2e-3 * np.abs(right).max())


@pytest.mark.parametrize("norm", [jaxnorm.layer_norm, partial(jaxnorm.group_norm, num_groups=1)])
def test_parameters_of_each_device_for_an_input_of_all(norm):
    """What varies along a mesh axis decides what gradients sum over it."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x, scales = jnp.arange(8.0).reshape(2, 4) ** 2, jnp.arange(32.0).reshape(8, 4) / 9

    def of_device(x, scale):
        return lax.psum((norm(x, scale[0]) ** 3).sum(), "d")

    def of_all(x, scales):
        return jax.vmap(lambda scale: (norm(x, scale) ** 3).sum())(scales).sum()

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    found, expected = (jax.grad(one, (0, 1))(x, scales) for one in (mapped, of_all))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [jaxnorm.layer_norm, partial(jaxnorm.group_norm, num_groups=2)])
def test_large_numbers_with_small_gradients(norm):
    """Powers of the standard deviation would be none in float32."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(2, 3, 2, 4)).astype(np.float32) for _ in range(2))

    def gradient(factor, small):
        return jax.vjp(norm, factor * x)[1](small * dy)[0] * (factor / small)

    np.testing.assert_allclose(gradient(1e16, 1e-6), gradient(1.0, 1.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", ["b, 256", "b, 4, 4, 64"])
def test_symbolic_sizes_take_the_specification(shape):
    pytest.importorskip("flatbuffers")
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    norm = jax.jit(jax.grad(lambda x: (jaxnorm.group_norm(x) ** 3).sum()))
    program = jax.export.export(norm)(x)
    example = jax.random.normal(jax.random.key(0), (3, *x.shape[1:]))
    np.testing.assert_allclose(program.call(example), norm(example), rtol=1e-3, atol=1e-4)
