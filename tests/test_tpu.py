"""What norms cost on TPUs, read off programs compiled without one.

Between chips, a batch norm sends one all-reduce forward and one backward, of two vectors, or of
three where a mask makes the number of elements a matter of the data. Within one, a training step
moves a certain number of times the bytes of its input. What runs only when some mean is far from
the running one is in branches, and not counted.
"""

import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.diagnose import collectives

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.tpu import candidates as names
from benchmarks.tpu import costs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'",
)

FEATURES = 256
VECTORS = [FEATURES, FEATURES]
# By the shape of a mask, without its first axis, how many numbers each operand holds.
MASKS = {
    "no mask": (None, VECTORS),
    "per example": ((1, 1, 1), [1, *VECTORS]),
    "per feature": ((4, 4, FEATURES), [FEATURES, *VECTORS]),
}
TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}


@pytest.fixture(scope="module")
def without_a_tpu():
    """Environment in which libtpu asks no machine what it is, and shares one with other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield


@pytest.fixture(params=TOPOLOGIES, ids=lambda chips: f"{chips} chips")
def mesh(request, without_a_tpu):
    topology = topologies.get_topology_desc(TOPOLOGIES[request.param], platform="tpu")
    return Mesh(np.array(topology.devices), ("batch",), axis_types=(AxisType.Auto,))


def training(axis_name=None):
    """One call of the layer, that also returns the running statistics."""
    layer = jaxnorm.linen.BatchNorm(
        use_running_average=False, dtype=jnp.bfloat16, axis_name=axis_name
    )

    def normalize(params, stats, x, mask):
        variables = {"params": params, "batch_stats": stats}
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    return normalize


def under_jit(mesh):
    """Arrays are whole; the compiler inserts the collectives."""
    del mesh
    return training()


def under_shard_map(mesh):
    """Each chip has a part; the layer sums over the named axis."""
    return jax.shard_map(
        training("batch"),
        mesh=mesh,
        in_specs=(P(), P(), P("batch"), P("batch")),
        out_specs=(P("batch"), P()),
    )


CONTEXTS = {"jit": under_jit, "shard_map": under_shard_map}


def sent(function, mesh, mask, *, backward):
    """How many float32 numbers each collective sends that always runs.

    In one call of the layer, or in one training step; a list for each collective.
    """

    def step(params, stats, x, mask, dy):
        def forward(params, x):
            return function(params, stats, x, mask)

        if not backward:
            return forward(params, x)
        y, transpose, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, updated, transpose(dy)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    examples = 8 * mesh.size
    x = array((examples, 4, 4, FEATURES), jnp.bfloat16, P("batch"))
    vector = array((FEATURES,), jnp.float32, P())
    params, stats = {"scale": vector, "bias": vector}, {"mean": vector, "var": vector}
    mask = None if mask is None else array((examples, *mask), jnp.bool_, P("batch"))
    found = collectives(jax.jit(step).lower(params, stats, x, mask, x).compile())
    assert {one.kind for one in found} == {"all-reduce"}
    assert not any(one.repeated for one in found)
    always = [one.shapes for one in found if not one.conditional]
    assert all(shape.startswith("f32[") for shapes in always for shape in shapes), always
    return [sorted(map(numbers, shapes)) for shapes in always]


def numbers(shape):
    return math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2])))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_one_all_reduce_forward_and_one_backward(context, mask, mesh):
    function = CONTEXTS[context](mesh)
    shape, forward = MASKS[mask]
    assert sent(function, mesh, shape, backward=False) == [forward]
    assert sent(function, mesh, shape, backward=True) == [forward, VECTORS]


# A step moves x in and y out, forward; x and dy in and dx out, backward. What reduces over rows or
# slabs and then uses them reads x twice each way, unless it holds them in between, as kernels do.
MOVED = [
    ("BatchNorm", names.OURS, 7.0),
    ("LayerNorm", names.OURS, 7.0),
    ("LayerNorm", names.ALWAYS, 5.0),
    ("RMSNorm", names.OURS, 7.0),
    ("RMSNorm", names.ALWAYS, 5.0),
    ("GroupNorm", names.ALWAYS, 5.0),
    ("InstanceNorm", names.ALWAYS, 5.0),
]


def moved(method, name):
    """Bytes between one chip and its memory, over those of x."""
    (candidate,) = (one for one in names.METHODS[method] if one.name == name)
    return costs.cost_of(candidate, costs.mesh_of(1)).hbm.always


@pytest.mark.parametrize(("method", "name", "times_x"), MOVED)
def test_bytes_moved(method, name, times_x, without_a_tpu):
    assert moved(method, name) == pytest.approx(times_x, rel=0.005)


@pytest.mark.slow  # Convolutions take a minute to compile.
def test_a_convnet_moves_no_more_than_with_flaxs_unstable_variance(without_a_tpu):
    ours, flax = (moved("ConvNet, BatchNorm", name) for name in (names.OURS, names.FLAX_FAST))
    assert ours <= 1.005 * flax
