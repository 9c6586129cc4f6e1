"""Progress on long work."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Job = TypeVar("Job")


def each(jobs: Iterable[Job], name: str = "runs") -> Iterator[Job]:
    """The jobs one after the other, behind a bar with the one at work."""
    listed = list(jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[job]}"),
    )
    # A log file gets the finished bar only.
    with Progress(*columns, console=Console(), auto_refresh=sys.stdout.isatty()) as progress:
        task = progress.add_task(name, total=len(listed), job="")
        for job in listed:
            progress.update(task, job=_words(job))
            yield job
            progress.advance(task)
        progress.update(task, job="")


def _words(job: object) -> str:
    return ", ".join(map(str, job)) if isinstance(job, tuple) else str(job)
