"""The derivative rule equals the specification, in value and in every derivative.

Three things are compared in float64: the library's rule, plain autodiff of the specification
`normalize_plainly`, and, where no derivative is trusted, finite differences.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import jaxnorm
from jaxnorm.core import axes as ax
from jaxnorm.core.fused import normalize_by, normalize_fused
from jaxnorm.core.standardize import Plan, apply_affine, apply_stats, normalize_plainly

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")
TOLERANCE = dict(rtol=1e-10, atol=1e-10)

# A first derivative from nine values, with an error of the eighth power of the step.
EIGHTH_ORDER_DIFFERENCE = np.array(
    [1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280]
)

# The default run takes one case of each kind, a run with -m slow all of them.
COMMON = ("conv", "two feature axes", "no parameters", "masked elements")
SOME_CASES = [
    pytest.param(case, id=case.name, marks=() if case.name in COMMON else pytest.mark.slow)
    for case in CASES
]


HINTS = {
    "none": lambda plan, x, where: None,
    "near": lambda plan, x, where: x.mean(plan.axes, keepdims=True) + 0.3,
    "far": lambda plan, x, where: jnp.full((1,) * x.ndim, 1e3),
    "evidence": lambda plan, x, where: normalize_plainly(plan, x, None, None, where)[1],
}


def losses(case, dtype=np.float64, use_mean=True, hint="none"):
    """The same scalar function by the rule and by the specification, and its arguments.

    The rule may have a hint of the moments. The function depends on the result and on the moments,
    non-linearly, so that no derivative vanishes.
    """
    x, scale, bias, mask = case.arrays(dtype=dtype)
    axis = ax.canonical_axes(case.axis, x.ndim, "test")
    scale, bias = (
        None if p is None else ax.lay_along(jnp.asarray(p), axis, x.ndim) for p in (scale, bias)
    )
    plan = Plan(ax.other_axes(axis, x.ndim), 1e-3, None, jnp.dtype(dtype), use_mean)
    weights = np.random.default_rng(1).normal(size=x.shape)

    where = None if mask is None else jnp.asarray(mask)
    hint = jax.tree.map(jax.lax.stop_gradient, HINTS[hint](plan, jnp.asarray(x), where))

    def loss(normalize, x, scale, bias):
        y, seen = normalize(plan, x, scale, bias, where)
        mean = seen.mean if use_mean else jnp.ones_like(seen.var)
        return (
            (weights * jnp.sin(y.real)).sum()
            + (weights * y.imag**2).sum()
            + (mean.real**3 + jnp.cos(mean.imag) * seen.var**2).sum()
        )

    given = [i for i, p in enumerate((x, scale, bias)) if p is not None]
    arguments = jnp.asarray(x), scale, bias
    rule = partial(normalize_fused, hint=hint)
    return partial(loss, rule), partial(loss, normalize_plainly), arguments, given


def along(function, arguments, given, seed=2):
    """`function` of one number, along a random direction through `arguments`."""
    rng = np.random.default_rng(seed)
    direction = [
        None if i not in given else jnp.asarray(rng.normal(size=a.shape), a.dtype)
        for i, a in enumerate(arguments)
    ]

    def of_number(t):
        moved = (
            a if d is None else a + t.astype(a.dtype) * d
            for a, d in zip(arguments, direction, strict=True)
        )
        return function(*moved)

    return of_number


MODES = {
    "value": lambda f, given: f,
    "grad": lambda f, given: jax.grad(f, given),
    "grad by x alone": lambda f, given: jax.grad(f, 0),
    "grad by parameters alone": lambda f, given: jax.grad(f, given[1:] or given),
    "jacfwd": lambda f, given: jax.jacfwd(f, given),
    "jacfwd of grad": lambda f, given: jax.jacfwd(jax.grad(f, given), given),
    "jacrev of grad": lambda f, given: jax.jacrev(jax.grad(f, given), given),
    "jacfwd of jacfwd": lambda f, given: jax.jacfwd(jax.jacfwd(f, given), given),
    "grad of jvp": lambda f, given: jax.grad(
        lambda *a: jax.jvp(lambda x: f(x, *a[1:]), (a[0],), (jnp.cos(a[0]),))[1], given
    ),
    "linearize": lambda f, given: lambda *a: jax.linearize(lambda x: f(x, *a[1:]), a[0])[1](a[0]),
    "vmap of grad": lambda f, given: (
        lambda *a: jax.vmap(lambda x: jax.grad(f, given)(x, *a[1:]))(
            jnp.stack([a[0], jnp.sin(a[0])])
        )
    ),
    "vmap of jvp": lambda f, given: (
        lambda *a: jax.vmap(lambda t: jax.jvp(lambda x: f(x, *a[1:]), (a[0],), (t,))[1])(
            jnp.stack([a[0], jnp.sin(a[0])])
        )
    ),
    "vmap of hessian product": lambda f, given: (
        lambda *a: jax.vmap(lambda t: jax.jvp(lambda x: jax.grad(f)(x, *a[1:]), (a[0],), (t,))[1])(
            jnp.stack([a[0], jnp.sin(a[0])])
        )
    ),
    "checkpoint": lambda f, given: jax.grad(jax.checkpoint(f), given),
    "scan": lambda f, given: jax.grad(
        lambda *a: jax.lax.scan(lambda c, _: (c + f(a[0] * c, *a[1:]), None), 1.0, None, 2)[0],
        given,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SOME_CASES)
def test_rule_equals_specification(case, mode):
    rule, specification, arguments, given = losses(case)
    transform = MODES[mode]
    found, expected = (
        jax.jit(transform(f, tuple(given)))(*arguments) for f in (rule, specification)
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("hint", [hint for hint in HINTS if hint != "none"])
@pytest.mark.parametrize("mode", ["grad", "vmap of hessian product"])
@pytest.mark.parametrize("case", SOME_CASES)
def test_no_derivative_depends_on_what_was_known_before(case, mode, hint):
    rule, specification, arguments, given = losses(case, hint=hint)
    found, expected = (
        jax.jit(MODES[mode](f, tuple(given)))(*arguments) for f in (rule, specification)
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("mode", ["value", "grad", "grad of jvp", "vmap of jvp", "linearize"])
@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=lambda case: case.name)
def test_rule_equals_specification_about_the_origin(case, mode, dtype):
    rule, specification, arguments, given = losses(case, dtype, use_mean=False)
    found, expected = (
        jax.jit(MODES[mode](f, tuple(given)))(*arguments) for f in (rule, specification)
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "mode", ["grad", "jacfwd of grad", "jacfwd of jacfwd", "vmap of jvp", "linearize"]
)
def test_rule_equals_specification_without_jit(mode):
    rule, specification, arguments, given = losses(CASES[8])
    found, expected = (MODES[mode](f, tuple(given))(*arguments) for f in (rule, specification))
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("case", SOME_CASES)
def test_three_orders_along_a_line(case):
    """Each derivative is the finite difference of the one before, and forward is reverse."""
    rule, specification, arguments, given = losses(case)

    def orders(differentiate, f, order=3):
        line = along(f, arguments, given)
        return [line := differentiate(line) for _ in range(order)]

    forward, reverse = orders(jax.jacfwd, rule), orders(jax.grad, rule)
    mixed = jax.jacfwd(jax.grad(orders(jax.jacfwd, rule, 1)[0]))
    expected = orders(jax.jacfwd, specification)[2]
    zero = jnp.zeros(())
    third = jax.jit(lambda t: [f(t) for f in (forward[2], reverse[2], mixed, expected)])(zero)
    chex.assert_trees_all_close(third, [third[-1]] * 4, **TOLERANCE)

    step = 1e-3
    offsets = step * np.arange(-4, 5)
    functions = [along(rule, arguments, given), *forward[:2]]
    values = jax.jit(jax.vmap(lambda t: jnp.stack([f(t) for f in functions])))(offsets)
    differences = EIGHTH_ORDER_DIFFERENCE @ np.asarray(values) / step
    derivatives = jax.jit(lambda t: jnp.stack([f(t) for f in forward]))(zero)
    np.testing.assert_allclose(differences, derivatives, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["value", "grad", "grad of jvp", "vmap of jvp", "linearize"])
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=lambda case: case.name)
def test_complex_rule_equals_specification(case, mode):
    rule, specification, arguments, given = losses(case, np.complex128)
    transform = MODES[mode]
    found, expected = (
        jax.jit(transform(f, tuple(given)))(*arguments) for f in (rule, specification)
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


def test_complex_scale_on_real_input():
    x = jnp.asarray(CASES[0].arrays()[0])
    scale = jnp.array([[1 + 2j, 3j, 1.0]])
    plan = Plan((0,), 1e-3, None, jnp.dtype("complex128"))

    def loss(normalize, x, scale):
        return jnp.sin(normalize(plan, x, scale, None, None)[0].imag).sum()

    found, expected = (
        jax.grad(partial(loss, f), (0, 1))(x, scale) for f in (normalize_fused, normalize_plainly)
    )
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_given_statistics_have_all_derivatives(case):
    x, scale, bias, _ = (None if a is None else jnp.asarray(a) for a in case.arrays())
    axis = ax.canonical_axes(case.axis, x.ndim, "test")
    scale, bias = (ax.lay_along(p, axis, x.ndim) for p in (scale, bias))
    plan = Plan(ax.other_axes(axis, x.ndim), 1e-3, None, x.dtype)
    stats = jaxnorm.Stats(scale * 2, jnp.exp(bias))

    def plainly(x, stats, scale, bias):
        return apply_affine(apply_stats(x, stats, plan.epsilon), scale, bias)

    def ours(x, stats, scale, bias):
        return normalize_by(plan, x, stats, scale, bias, None)

    def second(f):
        loss = lambda *a: jnp.sin(f(*a)).sum()  # noqa: E731
        return jax.jacfwd(jax.grad(loss, (0, 1, 2, 3)), 1)(x, stats, scale, bias)

    chex.assert_trees_all_close(second(ours), second(plainly), **TOLERANCE)


def test_constant_features_have_every_derivative():
    """At variance 0 a clip of the variance would halve what is second order."""
    plan = Plan((0,), 1e-3, None, jnp.dtype("float64"))
    x = jnp.full((4, 1), 3.7)

    def loss(normalize, x):
        y, seen = normalize(plan, x, None, None, None)
        return jnp.exp(y).sum() + seen.var.sum()

    def exactly(x):
        centred = x - x.mean(0, keepdims=True)
        var = (centred**2).mean(0, keepdims=True)
        return jnp.exp(centred / jnp.sqrt(var + 1e-3)).sum() + var.sum()

    for derivative in (jax.grad, jax.hessian):
        found = derivative(partial(loss, normalize_fused))(x)
        chex.assert_trees_all_close(found, derivative(exactly)(x), rtol=1e-8, atol=1e-8)
