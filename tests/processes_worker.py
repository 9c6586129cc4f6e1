"""One of the processes of `test_processes.py`, with four CPU devices of its own.

It runs every case on the devices of both processes and writes the results, gathered from all
devices, to a file.

    python processes_worker.py PORT PROCESS FILE
"""

import os
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

PROCESSES, DEVICES, LOCAL_ROWS, FEATURES = 2, 8, 4, 3
MOMENTUM, EPSILON = 0.75, 1e-5
SCALE, BIAS = np.array([0.5, 1, -2], np.float32), np.array([1, 0, 3], np.float32)
ALL = (tuple(range(DEVICES)),)
# Of unequal sizes, with members in both processes.
ACROSS = ((0, 5), (1, 2, 4, 7), (3,), (6,))


class Case(NamedTuple):
    """What differs from case to case.

    Attributes:
        context: "jit" on arrays spread over the devices, or "shard_map" with an axis name.
        masked: whether there is a mask, which leaves unequal numbers on the devices, on one none.
        mean: of the input, in its standard deviations.
        shift: the estimate of the mean that `batch_norm` is given.
        dtype: of the input.
        groups: of the devices that pool together.
    """

    context: str
    masked: bool = True
    mean: float = 0.0
    shift: float = 0.0
    dtype: str = "float32"
    groups: tuple[tuple[int, ...], ...] = ALL


CASES = {
    "jit": Case("jit", masked=False),
    "jit, masked": Case("jit"),
    "jit, large mean": Case("jit", mean=1e4),
    "jit, bfloat16": Case("jit", dtype="bfloat16"),
    "shard_map": Case("shard_map", masked=False),
    "shard_map, masked": Case("shard_map"),
    "shard_map, large mean": Case("shard_map", mean=1e4),
    "shard_map, large mean that is known": Case("shard_map", mean=1e4, shift=1e4),
    "shard_map, groups across processes": Case("shard_map", groups=ACROSS),
}


class Rows(NamedTuple):
    """The whole batch: input, mask, and the slope of the loss along the result."""

    x: Any
    where: Any
    slope: Any


def rows_of(case):
    """As NumPy arrays, the same in every process."""
    rng = np.random.default_rng(0)
    x, slope = rng.normal(size=(2, DEVICES * LOCAL_ROWS, FEATURES))
    where = rng.random((len(x), 1)) < 0.6
    where[2 * LOCAL_ROWS : 3 * LOCAL_ROWS] = False  # device 2 has none
    return Rows(
        np.asarray(jnp.asarray(x + case.mean, case.dtype)),
        where if case.masked else np.ones_like(where),
        np.asarray(jnp.asarray(slope, case.dtype)),
    )


def forward(case, x, where, scale, bias):
    """The result, and a row of running mean and variance after one batch."""
    options: dict[str, Any] = dict(where=where if case.masked else None, epsilon=EPSILON)
    if case.context == "shard_map":
        options |= dict(axis_name="devices")
    if case.groups is not ALL:
        options |= dict(axis_index_groups=case.groups)
    y, seen = jaxnorm.batch_norm(x, scale, bias, shift=case.shift, **options)
    start = jaxnorm.Stats(jnp.full(FEATURES, case.mean), jnp.ones(FEATURES))
    running, _ = jaxnorm.update_running(start, seen, momentum=MOMENTUM)
    return y, (running.mean[None], running.var[None])


def outcome(case, mesh):
    """Results, gradients and running statistics of one case, by name, whole in every process."""

    def whole(*arrays):
        return forward(case, *arrays)

    spread = P("devices")
    if case.context == "shard_map":
        in_specs = (spread, spread, P(), P())
        whole = jax.shard_map(whole, mesh=mesh, in_specs=in_specs, out_specs=spread)

    def loss(x, scale, bias, where, slope):
        y, running = whole(x, where, scale, bias)
        return (y * slope).sum(dtype=jnp.float32), (y.astype(jnp.float32), *running)

    def place(array):
        own = np.split(array, PROCESSES)[jax.process_index()]
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spread), own)

    x, where, slope = map(place, rows_of(case))
    gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    (dx, *gradients), (y, *running) = gradient(x, SCALE, BIAS, where, slope)
    found = (y, dx.astype(jnp.float32), *gradients, *running)
    names = ("y", "dx", "dscale", "dbias", "mean", "var")
    return dict(zip(names, process_allgather(found, tiled=True), strict=True))


def main(port, process, path):
    jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(
        f"localhost:{port}", PROCESSES, int(process), initialization_timeout=60
    )
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    found = {name: outcome(case, mesh) for name, case in CASES.items()}
    np.savez(
        path, **{f"{name}/{what}": a for name, one in found.items() for what, a in one.items()}
    )
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        # Without goodbye, in which JAX would wait for the other process, which waits for this one.
        os._exit(1)
