"""What `batch_norm_devices.py` prints: the ways, and how far each ends from one device."""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.syntax import Syntax
from rich.table import Table

from parts.command import UsageError
from parts.devices import Run, Task, train
from parts.devices_task import whole_step

ALLOWANCE = 50
"""A way may differ from one device this many times as much as one device does from itself when the
examples of each batch come in reverse order, so that the same numbers are added up otherwise."""

Ways = Mapping[Any, Sequence[Callable[..., Run]]]
"""The functions of each way: the first is called, all are shown."""


def compare_all(task: Task, ways: Ways) -> bool:
    """Trains in all ways, prints what came of it, and returns whether they agree."""
    # In a pod, one process speaks for all.
    console = Console(quiet=jax.process_index() > 0, highlight=False)
    console.print(describe(task))
    obstacles = {way: obstacle(way, task.devices) for way in ways}
    for way, reason in obstacles.items():
        if reason:
            console.print(f"without {way}: {reason}")
    ways = {way: functions for way, functions in ways.items() if not obstacles[way]}
    if not ways:
        raise UsageError("no way is left; --ways jit can be gone everywhere")
    runs = run_all(task, ways, console)

    for functions in ways.values():
        for function in functions:
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


def by_one_device(task: Task) -> Run:
    """The whole batch on one device: what all ways must agree with."""
    place = partial(jax.device_put, device=jax.local_devices()[0])
    return train(task, jax.jit(whole_step), place(task.state), place)


def run_all(task: Task, ways: Ways, console: Console) -> dict[str, Run]:
    """One device, in two orders of the examples, and then the ways."""
    reverse = [jax.tree.map(lambda leaf: leaf[::-1], batch) for batch in task.batches]
    todo: list[tuple[str, Callable[[Task], Run], Task]] = [
        ("one device", by_one_device, task),
        ("reversed", by_one_device, task._replace(batches=reverse)),
        *((way, functions[0], task) for way, functions in ways.items()),
    ]
    # A log file gets the finished bar only.
    with Progress(console=console, auto_refresh=sys.stdout.isatty()) as progress:
        steps = progress.track(todo, description="training")
        return {name: function(its_task) for name, function, its_task in steps}


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
