"""What `batch_norm_devices.py` needs on several devices, besides what it is there to show."""

import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.diagnose import Collective, collectives
from parts.command import UsageError
from parts.devices_task import Batch, State

CPU_DEVICES = 8


class Task(NamedTuple):
    """What to train, and where."""

    state: State
    batches: list[Batch]
    devices: list[Any]


class Run(NamedTuple):
    """What came of it."""

    losses: np.ndarray
    state: State
    collectives: tuple[Collective, ...]


def train(task: Task, step: Any, state: State, place: Callable[[Batch], Batch]) -> Run:
    """Trains on all batches; `place` puts one onto the devices."""
    compiled = step.lower(state, place(task.batches[0])).compile()
    losses = []
    for batch in task.batches:
        state, loss = compiled(state, place(batch))
        losses.append(float(loss))
    return Run(np.array(losses), jax.tree.map(np.asarray, state), collectives(compiled))


def find_devices(count: int | None, batch_size: int) -> list[Any]:
    """The devices to train on: all, or as many as asked for; a batch must fit them evenly."""
    # Without effect where there are GPUs or TPUs.
    if jax.config.values["jax_num_cpu_devices"] < 0:
        jax.config.update("jax_num_cpu_devices", count or CPU_DEVICES)
    # The two processes need memory on the GPUs of this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A ValueError says that there is no pod or cluster, whose processes it would find.
    with contextlib.suppress(ValueError):
        jax.distributed.initialize()
    found = jax.devices()
    count = count or len(found)
    if count > len(found) or (count < len(found) and jax.process_count() > 1):
        raise UsageError(
            f"--devices {count}, but the {jax.process_count()} processes have {len(found)} of "
            f"platform {found[0].platform}; leave it out to use all, or set JAX_PLATFORMS=cpu to "
            f"make any number of a CPU"
        )
    if batch_size % count:
        raise UsageError(
            f"--batch-size {batch_size} does not fit {count} devices evenly; "
            f"--batch-size {batch_size + -batch_size % count} does"
        )
    return found[:count]


def spread(batch: Batch, mesh: Mesh) -> Batch:
    """Puts rows onto the devices: each process its own, the only ones that it needs to load."""

    def place(leaf: np.ndarray) -> jax.Array:
        own = np.split(leaf, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P("devices")), own)

    return jax.tree.map(place, batch)


def cut(batch: Batch, parts: int) -> Batch:
    """Makes two of the first axis of each array: the parts, and the rows of each."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)


def in_two(function: Callable[[int], Run]) -> Run:
    """What `function` returns, called with 0 and with 1 in two processes; both return the same."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        futures = [pool.submit(function, process) for process in range(2)]
        try:
            runs = [future.result() for future in as_completed(futures)]
        except BaseException:
            # If one fails, the other would wait for it.
            for child in active_children():
                child.kill()
            raise
    return runs[0]


def find_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def silence() -> None:
    """Drops what this process prints, errors apart: Gloo reports each connection of CPU devices."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
