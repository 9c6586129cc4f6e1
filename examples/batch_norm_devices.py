"""Batch normalization on many devices, four ways: jit, shard_map, pmap, and two processes.

The statistics of batch normalization are those of the whole batch. Where it is spread over devices,
each has to learn of the examples of the others, and to count them: the last batch of an epoch is
rarely full, and a device with three examples must not weigh as much as one with 32.

Trains a small network on digits (`parts/devices_task.py`), from the same weights on the same
batches, on one device and in four ways on several. Prints the functions in which the ways differ,
how far each ends from the single device, and what the devices exchange in a step, read off the
compiled program. Fails if a way differs by more than rounding.

    python examples/batch_norm_devices.py
    python examples/batch_norm_devices.py --quick --ways jit processes --devices 4

A CPU is made eight devices; GPUs and TPUs are used as they are. In a TPU pod, or wherever
`jax.distributed.initialize()` finds the other processes, start it in each of them: it trains on all
devices, and leaves out the ways that make no sense there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from parts.command import UsageError, check_least, run
from parts.devices import Run, Task, cut, find_devices, find_port, in_two, silence, spread, train
from parts.devices_report import compare_all
from parts.devices_task import Batch, State, evaluate, make_batches, make_state, update, whole_step

Way = Literal["jit", "shard_map", "pmap", "processes"]


@dataclass(frozen=True)
class Options:
    """Train a small network with batch normalization on many devices, in four ways."""

    quick: bool = False
    """A short run, enough to see that everything works."""
    steps: int | None = None
    """Training steps; by default 48, and 12 in a quick run."""
    batch_size: int = 256
    """Images in each batch, on all devices together; the last of an epoch is padded to it."""
    devices: int | None = None
    """Devices to use; by default all there are, and 8 where there is only a CPU."""
    ways: tuple[Way, ...] = get_args(Way)
    """Ways to go."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        check_least(self, steps=1, batch_size=1, devices=1)
        if not self.ways:
            raise UsageError(f"--ways needs at least one of {', '.join(WAYS)}")


# The script prints these functions: no line is longer than 79 characters.


def by_jit(task: Task) -> Run:
    """jit: arrays know where their parts lie; the step is as on one device."""
    mesh = Mesh(np.array(task.devices), ("devices",))
    copied = NamedSharding(mesh, P())
    step = jax.jit(whole_step, out_shardings=copied)
    state = jax.device_put(task.state, copied)
    return train(task, step, state, partial(spread, mesh=mesh))


def by_shard_map(task: Task) -> Run:
    """shard_map: the step sees one device's part, and names the axis."""
    mesh = Mesh(np.array(task.devices), ("devices",))

    @jax.shard_map(mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
    def step(state: State, batch: Batch) -> tuple[State, Any]:
        # Gradients by what is the same on all devices come out summed.
        return update(state, *evaluate(state, batch, axis_name="devices"))

    state = jax.device_put(task.state, NamedSharding(mesh, P()))
    return train(task, jax.jit(step), state, partial(spread, mesh=mesh))


def by_pmap(task: Task) -> Run:
    """pmap: as shard_map, with an array axis for the devices."""

    @partial(jax.pmap, axis_name="devices", in_axes=(None, 0), out_axes=None)
    def step(state: State, batch: Batch) -> tuple[State, Any]:
        loss, stats, gradients = evaluate(state, batch, axis_name="devices")
        # All devices hold a copy of the one loss, and each has gone back from
        # all the copies to its own parameters: the mean is the gradient.
        gradients = lax.pmean(gradients, "devices")
        return update(state, loss, stats, gradients)

    return train(task, step, task.state, partial(cut, parts=len(task.devices)))


def by_processes(task: Task) -> Run:
    """processes: two more, each with half of the devices, by way of jit."""
    half = len(task.devices) // 2
    # Devices cannot be sent along: the processes find their own.
    each = partial(in_process, find_port(), half, task._replace(devices=[]))
    return in_two(each)


def in_process(port: int, devices: int, task: Task, process: int) -> Run:
    """In each; in a TPU pod, `jax.distributed.initialize()` is enough."""
    silence()
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        f"localhost:{port}",
        num_processes=2,
        process_id=process,
        local_device_ids=range(process * devices, (process + 1) * devices),
    )
    run = by_jit(task._replace(devices=jax.devices()))
    jax.distributed.shutdown()
    return run


WAYS: dict[Way, tuple[Callable[..., Run], ...]] = {
    "jit": (by_jit,),
    "shard_map": (by_shard_map,),
    "pmap": (by_pmap,),
    "processes": (by_processes, in_process),
}
"""The functions of each way: the first is called, all are shown."""


def main(options: Options) -> bool:
    """Trains in all ways, prints what came of it, and returns whether they agree."""
    devices = find_devices(options.devices, options.batch_size)
    batches = make_batches(options.batch_size, options.steps or (12 if options.quick else 48))
    task = Task(make_state(batches[0]), batches, devices)
    return compare_all(task, {way: WAYS[way] for way in options.ways})


if __name__ == "__main__":
    sys.exit(0 if run(main, Options) else 1)
