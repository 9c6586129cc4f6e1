"""Batch normalization on many devices, four ways: jit, shard_map, pmap, and two processes.

The statistics of batch normalization are those of the whole batch. Where it is spread over devices,
each has to learn of the examples of the others, and to count them: the last batch of an epoch is
rarely full, and a device with three examples must not weigh as much as one with 32.

This script trains a small convolutional network on handwritten digits, from the same weights on the
same batches, on one device and in four ways on several:

- jit: on arrays spread over the devices; the compiler adds what these have to exchange;
- shard_map: by a function of the part on one device, which names the axis of the devices;
- pmap: the same in its older form, with an array axis for the devices;
- processes: the way of jit in two processes, each with half of the devices.

What is trained is in `digits_convnet.py`: `evaluate` gives the loss, running statistics and
gradients of a batch, and `update` takes a step.

It prints the functions in which the ways differ, how far each ends from the single device, and what
the devices exchange in a step, read off the compiled program. It fails if a way differs by more
than rounding.

How to run:

    python examples/batch_norm_devices.py
    python examples/batch_norm_devices.py --quick --ways jit processes --devices 4

A CPU is made eight devices; GPUs and TPUs are used as they are. In a TPU pod, or wherever
`jax.distributed.initialize()` finds the other processes, start it in each of them: it trains on all
devices, and leaves out the ways that make no sense there.
"""

import contextlib
import inspect
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tyro
from digits import UsageError
from digits_convnet import Batch, State, evaluate, make_batches, make_state, update
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table

from jaxnorm.diagnose import Collective, collectives

Way = Literal["jit", "shard_map", "pmap", "processes"]

CPU_DEVICES = 8
STEPS, QUICK_STEPS = 48, 12
# A way may differ from one device this many times as much as one device does from itself when the
# examples of each batch come in reverse order, so that the same numbers are added up otherwise.
ALLOWANCE = 50


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


# --- Training ------------------------------------------------------------------------------------


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


# --- The ways: what to copy -----------------------------------------------------------------------
# The script prints these functions: no line is longer than 79 characters.


def whole_step(state: State, batch: Batch) -> tuple[State, Any]:
    """One step on the whole batch, wherever its parts lie."""
    return update(state, *evaluate(state, batch))


def by_one_device(task: Task) -> Run:
    """The whole batch on one device: what all ways must agree with."""
    place = partial(jax.device_put, device=jax.local_devices()[0])
    return train(task, jax.jit(whole_step), place(task.state), place)


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


# The functions of each way: the first is called, all are shown.
WAYS: dict[Way, tuple[Callable[..., Run], ...]] = {
    "jit": (by_jit,),
    "shard_map": (by_shard_map,),
    "pmap": (by_pmap,),
    "processes": (by_processes, in_process),
}


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


# --- The experiment -------------------------------------------------------------------------------


def main(options: Options) -> bool:
    """Trains in all ways, prints what came of it, and returns whether they agree."""
    check_options(options)
    devices = find_devices(options)
    default_steps = QUICK_STEPS if options.quick else STEPS
    batches = make_batches(options.batch_size, options.steps or default_steps)
    task = Task(make_state(batches[0]), batches, devices)

    # In a pod, one process speaks for all.
    console = Console(quiet=jax.process_index() > 0, highlight=False)
    console.print(describe(task))
    obstacles = {way: obstacle(way, devices) for way in options.ways}
    for way, reason in obstacles.items():
        if reason:
            console.print(f"without {way}: {reason}")
    ways: list[Way] = [way for way in options.ways if not obstacles[way]]
    if not ways:
        raise UsageError("no way is left; --ways jit can be gone everywhere")
    runs = run_all(task, ways, console)

    for way in ways:
        for function in WAYS[way]:
            console.print(Syntax(inspect.getsource(function), "python", theme="ansi_dark"))
    alone = runs.pop("one device")
    found = {name: distances(run, alone) for name, run in runs.items()}
    limit = ALLOWANCE * np.maximum(found["reversed"], np.finfo(np.float32).eps)
    console.print(make_table(runs, found | {"limit": limit}))
    # What is not a number is not within the limit either.
    wrong = [name for name, distance in found.items() if not np.all(distance <= limit)]
    if wrong:
        console.print(f"more than rounding away from one device: {', '.join(wrong)}", style="red")
    else:
        console.print("all agree with one device, to rounding")
    return not wrong


def run_all(task: Task, ways: list[Way], console: Console) -> dict[str, Run]:
    """One device, in two orders of the examples, and then the ways."""
    reverse = [jax.tree.map(lambda leaf: leaf[::-1], batch) for batch in task.batches]
    todo: list[tuple[str, Callable[[Task], Run], Task]] = [
        ("one device", by_one_device, task),
        ("reversed", by_one_device, task._replace(batches=reverse)),
        *((way, WAYS[way][0], task) for way in ways),
    ]
    # A log file gets the finished bar only.
    with Progress(console=console, auto_refresh=sys.stdout.isatty()) as progress:
        steps = progress.track(todo, description="training")
        return {name: function(its_task) for name, function, its_task in steps}


def check_options(options: Options) -> None:
    """Refuses impossible options before any time goes into training."""
    for name in ("steps", "batch_size", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not options.ways:
        raise UsageError(f"--ways needs at least one of {', '.join(WAYS)}")


def find_devices(options: Options) -> list[Any]:
    """The devices to train on: all, or as many as asked for."""
    # Without effect where there are GPUs or TPUs.
    if jax.config.values["jax_num_cpu_devices"] < 0:
        jax.config.update("jax_num_cpu_devices", options.devices or CPU_DEVICES)
    # The two processes need memory on the GPUs of this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A ValueError says that there is no pod or cluster, whose processes it would find.
    with contextlib.suppress(ValueError):
        jax.distributed.initialize()
    found = jax.devices()
    count = options.devices or len(found)
    if count > len(found) or (count < len(found) and jax.process_count() > 1):
        raise UsageError(
            f"--devices {count}, but the {jax.process_count()} processes have {len(found)} of "
            f"platform {found[0].platform}; leave it out to use all, or set JAX_PLATFORMS=cpu to "
            f"make any number of a CPU"
        )
    if options.batch_size % count:
        raise UsageError(
            f"--batch-size {options.batch_size} does not fit {count} devices evenly; "
            f"--batch-size {options.batch_size + -options.batch_size % count} does"
        )
    return found[:count]


def obstacle(way: str, devices: list[Any]) -> str | None:
    """Why a way cannot be gone here, if so."""
    processes = jax.process_count()
    if way == "pmap" and processes > 1:
        return f"its arrays are those of one process, and here are {processes}"
    if way == "processes" and processes > 1:
        return f"here are {processes} already, in which the other ways go"
    if way == "processes" and len(devices) % 2:
        return f"two processes cannot share {len(devices)} devices evenly"
    if way == "processes" and devices[0].platform == "tpu":
        return "this process holds the TPU"
    return None


def distances(found: Run, expected: Run) -> np.ndarray:
    """Of losses, parameters, statistics: the largest difference over the array's largest number."""

    def largest(a: Any, b: Any) -> np.ndarray:
        relative = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), a, b)
        # Unlike Python's maximum, NumPy's is not a number if one of these is not.
        return np.max(jax.tree.leaves(relative))

    pairs = zip(found.state[:2], expected.state[:2], strict=True)
    return np.array([largest(found.losses, expected.losses), *(largest(*pair) for pair in pairs)])


# --- What is printed ------------------------------------------------------------------------------


def describe(task: Task) -> str:
    """The size of the task, and how unevenly the valid examples may lie."""
    fewest = min((batch.valid for batch in task.batches), key=np.sum)
    counts = " ".join(str(part.sum()) for part in np.split(fewest, len(task.devices)))
    return (
        f"{len(task.batches)} steps of {len(fewest)} images on {len(task.devices)} "
        f"{task.devices[0].platform} devices; in the smallest batch, valid images on each: {counts}"
    )


def make_table(runs: dict[str, Run], distances: dict[str, np.ndarray]) -> Table:
    """How far each way is from one device, and what its devices exchange in a step."""
    table = Table(
        caption="Differences from one device, relative to the largest number of an array. "
        f"Reversed: one device, each batch in reverse order; limit: {ALLOWANCE} times that. "
        "Bytes: what each device gives, without what is in branches: this runs only where a mean "
        "is far from the running mean."
    )
    table.add_column("")
    for heading in ("loss", "parameters", "running\nstatistics", "collectives\na step", "bytes"):
        table.add_column(heading, justify="right")
    for name, numbers in distances.items():
        sent = runs[name].collectives if name in runs else ()
        always = [one for one in sent if not one.conditional]
        kinds = [f"{n} {kind}" for kind, n in Counter(one.kind for one in always).items()]
        if len(sent) > len(always):
            kinds.append(f"{len(sent) - len(always)} in branches")
        volume = f"{sum(one.bytes for one in always):,}" if sent else ""
        table.add_row(name, *(f"{number:.0e}" for number in numbers), "\n".join(kinds), volume)
    return table


if __name__ == "__main__":
    try:
        agree = main(tyro.cli(Options))
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(0 if agree else 1)
