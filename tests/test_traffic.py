"""What docs/devices.md says of traffic: how many numbers travel in each collective.

On 64 examples with 16 features on eight devices. Read off compiled programs: what is in branches
runs only where a mean is far from the running mean, and is counted apart.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modules import draw

import jaxnorm
from jaxnorm.core.devices import devices
from jaxnorm.core.pooling import usable_shift
from jaxnorm.diagnose import collectives

C = 16
X, MASK = draw((64, C)), jnp.arange(64)[:, None] < 40
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
PAIRS = [[i, i + 1] for i in range(0, 8, 2)]
EXAMPLES, FEATURES = P("d"), P(None, "d")


def mesh_of(kind=AUTO, sizes=(8,), names=("d",)):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def normalize(x, mask=None, **options):
    """Without the evidence, so that what only serves running statistics is not counted."""
    return jaxnorm.batch_norm(x, where=mask, **options)[0]


def evidence_too(x, size):
    return jaxnorm.ghost_batches(jaxnorm.batch_norm, size)(x)


def program(function, *arrays, mesh, specs):
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        return collectives(jax.jit(function).lower(*placed).compile())


def sent(function, *arrays, backward=False, kind=AUTO, spec=EXAMPLES):
    """Numbers in each operand of each collective that always runs, and how many run sometimes."""

    def loss(x, *others):
        return jnp.sin(jax.tree.leaves(function(x, *others))[0]).sum()

    run = jax.grad(loss) if backward else function
    found = program(run, *arrays, mesh=mesh_of(kind), specs=[spec] * len(arrays))
    assert {one.kind for one in found} <= {"all-reduce"}
    always = [sorted(map(numbers, one.shapes)) for one in found if not one.conditional]
    return always, sum(one.conditional for one in found)


def numbers(shape):
    return math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2])))


def by_device(function, check_vma=True, spec=EXAMPLES, **options):
    """`function` of the part of each device, which pools over them."""

    def mapped(*arrays):
        return jax.shard_map(
            partial(function, axis_name="d", **options),
            mesh=mesh_of(),
            in_specs=spec,
            out_specs=spec,
            check_vma=check_vma,
        )(*arrays)

    return mapped


WAYS = {
    "auto": (normalize, AUTO),
    "explicit": (normalize, EXPLICIT),
    "shard_map": (by_device(normalize), AUTO),
    "shard_map unchecked": (by_device(normalize, check_vma=False), AUTO),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_batch(way):
    function, kind = WAYS[way]
    for arrays, forward in (((X,), [C, C]), ((X, MASK), [1, C, C])):
        assert sent(function, *arrays, kind=kind) == ([forward], 2)
        assert sent(function, *arrays, kind=kind, backward=True) == ([forward, [C, C]], 2)


def test_pmap():
    mapped = jax.pmap(partial(normalize, axis_name="d"), axis_name="d")
    found = collectives(mapped.lower(X.reshape(8, 8, C)).compile())
    assert [one.conditional for one in found] == [False, True, True]


def test_groups_of_devices_send_tables():
    function = by_device(normalize, axis_index_groups=PAIRS)
    table = [4 * C, 4 * C]
    assert sent(function, X) == ([table], 2)
    assert sent(function, X, backward=True) == ([table, table], 2)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_ghost_batches_on_one_device_send_evidence_only(kind):
    ghosts = partial(evidence_too, size=4)
    assert sent(ghosts, X, kind=kind) == ([[C, C]], 2)
    assert sent(lambda x: ghosts(x)[0], X, kind=kind) == ([], 0)
    assert sent(ghosts, X, kind=kind, backward=True) == ([], 0)


def test_ghost_batches_of_several_devices():
    always, sometimes = sent(partial(evidence_too, size=16), X)
    assert always == [[C], [C, C], [C, C]]
    assert sometimes == 2


def test_ghost_batches_that_do_not_fit_devices_move_examples():
    found = program(partial(evidence_too, size=2), X[:24], mesh=mesh_of(), specs=[EXAMPLES])
    assert {"all-gather", "all-reduce"} == {one.kind for one in found}


def test_features_on_several_devices_decide_together():
    for kind in (AUTO, EXPLICIT):
        assert sent(normalize, X, kind=kind, spec=FEATURES) == ([[1]], 0)


@pytest.mark.parametrize("spec", [P(("d", "other")), P("d", "other")], ids=str)
def test_no_common_decision_with_devices_that_do_not_pool(spec):
    mesh = mesh_of(sizes=(4, 2), names=("d", "other"))
    mapped = jax.shard_map(
        partial(normalize, axis_name="d"), mesh=mesh, in_specs=spec, out_specs=spec
    )
    found = program(mapped, X, mesh=mesh, specs=[spec])
    assert [(len(one.shapes), one.conditional) for one in found] == [(1, False), (2, False)]


def test_several_models_at_once_decide_nothing():
    models = jnp.stack([X] * 3)
    found = program(jax.vmap(normalize), models, mesh=mesh_of(), specs=[FEATURES])
    assert [one.conditional for one in found] == [False, False]


@pytest.mark.parametrize("checked", [True, False])
def test_the_gradients_of_parameters(checked):
    """With checks they are what the backward pass sends anyway."""
    mapped = jax.shard_map(
        partial(jaxnorm.batch_norm, axis_name="d"),
        mesh=mesh_of(),
        in_specs=(EXAMPLES, P(), P()),
        out_specs=(EXAMPLES, P()),
        check_vma=checked,
    )
    gradients = jax.grad(lambda *arrays: jnp.sin(mapped(*arrays)[0]).sum(), (0, 1, 2))
    specs = [EXAMPLES, P(), P()]
    found = program(gradients, X, jnp.ones(C), jnp.ones(C), mesh=mesh_of(), specs=specs)
    vectors = [len(one.shapes) for one in found if not one.conditional]
    assert vectors == [2, 2 if checked else 4]


@pytest.mark.parametrize("checked", [True, False])
def test_the_running_mean_serves_where_it_is_known_to_agree(checked):
    def shift(mean, x):
        return usable_shift(mean, x, devices("d", None, "test"))

    mapped = jax.shard_map(
        shift, mesh=mesh_of(), in_specs=(P(), EXAMPLES), out_specs=P(), check_vma=checked
    )
    assert mapped(jnp.full(C, 5.0), X).tolist() == [5.0 if checked else 0.0] * C


# The norms of one example, whose features lie on several devices: forward, and with the backward.
LAYER, RMS = jaxnorm.layer_norm, jaxnorm.rms_norm
WHOLE, CUT = (partial(jaxnorm.group_norm, num_groups=n) for n in (8, 4))
CUT_LOCALLY = partial(jaxnorm.group_norm, num_groups=1, axis_index_groups=PAIRS)


@pytest.mark.parametrize(
    ("norm", "kind", "forward", "backward"),
    [
        (LAYER, AUTO, 2, 3),
        (LAYER, EXPLICIT, 1, 2),
        (by_device(LAYER, spec=FEATURES), AUTO, 1, 2),
        (RMS, AUTO, 1, 2),
        (RMS, EXPLICIT, 1, 2),
        (by_device(RMS, spec=FEATURES), AUTO, 1, 2),
        (WHOLE, AUTO, 0, 0),
        (WHOLE, EXPLICIT, 0, 0),
        (CUT, AUTO, 2, 3),
        (CUT, EXPLICIT, 2, 3),
        (by_device(CUT_LOCALLY, spec=FEATURES), AUTO, 1, 2),
    ],
)
def test_features_of_one_example(norm, kind, forward, backward):
    assert len(sent(norm, X, kind=kind, spec=FEATURES)[0]) == forward
    assert len(sent(norm, X, kind=kind, spec=FEATURES, backward=True)[0]) == backward
