"""Marks: values are read out of a program whatever they are wrapped in, and it stays the same."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxnorm.tools.adapter.marks import harvest, mark

pytestmark = pytest.mark.usefixtures("quick_compile")

X = np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2)
ZEROS = np.zeros(2, np.float32)


class Place(NamedTuple):
    """What `harvest` should find: a label, values, and how many axes of them are lifted."""

    label: str
    value: Any
    lifted: int = 0


class Program(NamedTuple):
    """A function of `X` with marks, and the places that a reader of it would write down."""

    name: str
    run: Callable[[jax.Array], Any]
    places: list[Place]


def noted(name, value):
    """The value, marked."""
    return mark((name,), value)[0]


def plain(x):
    y = noted("double", 2 * x)
    return noted("sum", y.sum()) + noted("input", x)


def doubled_rows(x):
    """In a scan, with a carry that grows, two marks to a step."""

    def step(carry, row):
        row = noted("scaled", row * carry)
        return noted("carry", carry + 1), row

    return lax.scan(step, 1.0, x)


def reversed_rows(x):
    def step(carry, row):
        return carry + 1, noted("scaled", row * carry)

    return lax.scan(step, 1.0, x, reverse=True)


def nested_scans(x):
    def outer(total, row):
        total, ys = lax.scan(lambda c, v: (c + v, noted("running", c + v)), total, row)
        return noted("total", total), ys

    return lax.scan(outer, 0.0, x)


def counted(x):
    """A scan that takes nothing one by one."""
    return lax.scan(lambda c, _: (noted("power", c * 2), None), x[0], length=3)


def in_branch(x, index):
    branches = (
        lambda row: noted("first", row + 1),
        lambda row: row * noted("second", 2 * row).sum() + noted("third", row),
        lambda row: -row,
    )
    return lax.switch(jnp.int32(index), branches, x[0])


def branches_in_scan(x):
    def step(carry, row):
        return carry + lax.cond(row[0] > 2, lambda: noted("large", row), lambda: row), None

    return lax.scan(step, jnp.zeros(2), x)


def scan_in_branch(x):
    return lax.cond(x[0, 0] > 0, lambda: doubled_rows(x)[0], lambda: jnp.float32(0))


def branches_of_each(x):
    """Where a batch decides, XLA runs both branches for all of it."""
    return jax.vmap(
        lambda row: lax.cond(row[0] > 2, lambda: noted("large", row), lambda: row * 10)
    )(x)


def columns(x):
    return jax.vmap(lambda column: noted("column", column.sum() * column), in_axes=1)(x)


def with_unmapped(x):
    """Of two values marked together one is the same for all, and marked alone it is not lifted."""

    def one(row):
        together = mark(("both",), row, x[0])
        return together[0] + together[1] + noted("alone", x[1])

    return jax.vmap(one)(x)


def nested_maps(x):
    return jax.vmap(lambda row: jax.vmap(lambda v: noted("each", v + row[0]))(row))(x)


def map_in_scan(x):
    return lax.scan(lambda c, row: (c, jax.vmap(lambda v: noted("each", v))(row)), 0, x)


def scan_in_map(x):
    """The scan's axis comes first although it lies inside."""
    return jax.vmap(lambda row: lax.scan(lambda c, v: (c, noted("each", v)), 0, row))(x)


@jax.custom_jvp
def steep(x):
    return noted("steep", 3 * x)


@steep.defjvp
def _(primals, tangents):
    return steep(*primals), tangents[0]


@jax.custom_vjp
def flat(x):
    return noted("flat", 5 * x)


flat.defvjp(lambda x: (flat(x), None), lambda _, g: (0 * g,))


def differentiated(x):
    """A mark is seen once, in the forward pass."""
    return jax.value_and_grad(lambda x: (noted("squares", x**2) ** 2).sum())(x)


def unmarked_programs(x):
    """Programs without marks run as they are."""
    y = lax.while_loop(lambda y: y.sum() < 100, lambda y: 2 * y, jax.nn.relu(x))
    y = jax.checkpoint(jnp.sin)(lax.cond(y.sum() > 3, jnp.cos, jnp.sin, y))
    return noted("end", jnp.linalg.solve(jnp.eye(3) + y @ y.T, y))


def end_of_unmarked():
    y = X.copy()
    while y.sum() < 100:
        y = 2 * y
    y = np.sin(np.cos(y)).astype(np.float64)
    return np.linalg.solve(np.eye(3) + y @ y.T, y)


STEPS = np.array([1, 2, 3], np.float32)
RUNNING = X.ravel().cumsum().reshape(3, 2)
PLAIN = [Place("double", 2 * X), Place("sum", 42.0), Place("input", X)]

PROGRAMS = [
    Program("plain", plain, PLAIN),
    Program(
        "scan",
        doubled_rows,
        [Place("scaled", X * STEPS[:, None], 1), Place("carry", STEPS + 1, 1)],
    ),
    Program("reverse scan", reversed_rows, [Place("scaled", X * STEPS[::-1, None], 1)]),
    Program(
        "nested scans",
        nested_scans,
        [Place("running", RUNNING, 2), Place("total", RUNNING[:, 1], 1)],
    ),
    Program("scan of nothing", counted, [Place("power", X[0] * 2 ** STEPS[:, None], 1)]),
    Program(
        "switch, first",
        partial(in_branch, index=0),
        [Place("first", X[0] + 1), Place("second", ZEROS), Place("third", ZEROS)],
    ),
    Program(
        "switch, second",
        partial(in_branch, index=1),
        [Place("first", ZEROS), Place("second", 2 * X[0]), Place("third", X[0])],
    ),
    Program(
        "switch, none",
        partial(in_branch, index=2),
        [Place("first", ZEROS), Place("second", ZEROS), Place("third", ZEROS)],
    ),
    Program("cond in scan", branches_in_scan, [Place("large", X * (X[:, :1] > 2), 1)]),
    Program(
        "scan in cond",
        scan_in_branch,
        [Place("scaled", X * STEPS[:, None], 1), Place("carry", STEPS + 1, 1)],
    ),
    Program("cond in vmap", branches_of_each, [Place("large", X, 1)]),
    Program("vmap of columns", columns, [Place("column", (X * X.sum(0)).T, 1)]),
    Program("nested vmaps", nested_maps, [Place("each", X + X[:, :1], 2)]),
    Program("vmap in scan", map_in_scan, [Place("each", X, 2)]),
    Program("scan in vmap", scan_in_map, [Place("each", X.T, 2)]),
    Program("jit", jax.jit(lambda x: jax.jit(plain)(x)), PLAIN),
    Program("checkpoint", jax.checkpoint(plain), PLAIN),
    Program("custom_jvp", steep, [Place("steep", 3 * X)]),
    Program("custom_vjp", flat, [Place("flat", 5 * X)]),
    Program("grad", differentiated, [Place("squares", X**2)]),
    Program("unmarked programs", unmarked_programs, [Place("end", end_of_unmarked())]),
]


def assert_places(found, expected):
    assert [(one.label, one.lifted) for one in found] == [((p.label,), p.lifted) for p in expected]
    for one, place in zip(found, expected, strict=True):
        (value,) = one.values
        np.testing.assert_allclose(value, place.value, rtol=1e-6, atol=1e-6, err_msg=place.label)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_what_was_marked_is_found_and_the_result_is_the_same(program):
    (out, found), expected = jax.jit(lambda x: (harvest(program.run)(x), program.run(x)))(X)
    assert_places(found, program.places)
    chex.assert_trees_all_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_every_branch_as_if_it_were_taken(taken):
    run = partial(in_branch, index=taken)
    found_and_expected = jax.jit(lambda x: (harvest(run, every_branch=True)(x), run(x)))
    (out, found), expected = found_and_expected(X)
    values = (("first", X[0] + 1), ("second", 2 * X[0]), ("third", X[0]))
    assert_places(found, [Place(*each) for each in values])
    np.testing.assert_allclose(out, expected)


def test_values_marked_together_are_mapped_together():
    """What depends on no mapped axis and is marked alone is there once."""
    _, (together, alone) = jax.jit(harvest(with_unmapped))(X)
    assert (together.lifted, alone.lifted) == (1, 0)
    np.testing.assert_array_equal(together.values[0], X)
    np.testing.assert_array_equal(together.values[1], np.broadcast_to(X[0], X.shape))
    np.testing.assert_array_equal(alone.values[0], X[1])


def test_a_mark_is_the_identity_in_value_and_in_every_derivative(x64):
    def curve(x, note):
        y = note(jnp.sin(x) * x[0])
        return (note(y**3) * note(x)).sum()

    def derivatives(note):
        fun = partial(curve, note=note)
        return jax.jit(lambda x: (fun(x), jax.grad(fun)(x), jax.hessian(fun)(x)))(X.ravel() * 1.0)

    marked, unmarked = derivatives(partial(noted, "note")), derivatives(lambda x: x)
    for a, b in zip(marked, unmarked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_harvested_functions_have_the_derivatives_of_the_function():
    """Those of found values too; unmarked functions keep derivatives of their own."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def run(x):
        return doubled_rows(straight_through(x))[1].sum()

    def total(x):
        out, (scaled, _) = harvest(run)(x)
        return out + scaled.values[0].sum()

    derivative = jax.jit(jax.grad(total))(X)
    np.testing.assert_allclose(derivative, np.repeat(2 * STEPS[:, None], 2, 1), rtol=1e-6)


def test_a_marked_function_gives_up_a_derivative_of_its_own():
    """Its value is right; it is differentiated as it is written, not as its rule says."""
    out, derivative = jax.value_and_grad(lambda x: harvest(flat)(x)[0].sum())(X)
    np.testing.assert_allclose(out, 5 * X.sum())
    np.testing.assert_allclose(derivative, np.full_like(X, 5))


def test_no_marks_no_places():
    out, found = harvest(lambda x: {"a": x, "b": None})(X)
    np.testing.assert_array_equal(out["a"], X)
    assert out["b"] is None
    assert found == []


def in_shards(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    return jax.shard_map(partial(noted, "x"), mesh=mesh, in_specs=spec, out_specs=spec)(x)


LOOPS = {
    "while": lambda x: lax.while_loop(lambda y: y.sum() < 100, partial(noted, "x"), x),
    "shard_map": in_shards,
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        partial(noted, "x"), x, lambda matvec, b: b, symmetric=True
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_programs_of_which_it_is_not_known_how_often_they_run_hide_what_is_marked(name):
    """In them, in the middle of others, and in each step of a scan."""

    def all_of_it(x):
        return noted("before", x), LOOPS[name](x), lax.map(lambda _: LOOPS[name](x), X[0])

    out, found = jax.eval_shape(harvest(all_of_it), X)
    assert [(place.label, place.inside, len(place.values)) for place in found] == [
        (("before",), None, 1),
        (("x",), name, 0),
        (("x",), name, 0),
    ]
    assert out == jax.eval_shape(all_of_it, X)


def test_text_that_is_returned_is_handed_through():
    def fun(x):
        return {"name": "double", "value": noted("double", 2 * x), "none": None}

    out, (place,) = harvest(fun)(X)
    assert out["name"] == "double"
    np.testing.assert_array_equal(out["value"], 2 * X)
    assert place.label == ("double",)
