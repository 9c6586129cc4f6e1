"""The command line of a script: what is wrong with its options is told in one line."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")


class UsageError(Exception):
    """Something the caller can put right: an option, or the data it points to."""


def check_least(options: Any, **least: int) -> None:
    """Refuses options below the least number that makes sense; None is no number."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least {bound}, not {value}")


def check_positive(options: Any, *names: str) -> None:
    """Refuses options that are no positive numbers."""
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be a positive number, not {value}")


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuses seeds that are none, or that count twice."""
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds must be numbers from 0 on, not {seeds}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must differ, else they count twice, not {seeds}")


def check_picture(path: Path) -> None:
    """Refuses to write a picture where none can be written, before any time goes into work."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UsageError(f"--out must end in {', '.join(PICTURE_SUFFIXES)}, not {path}")
    if not path.parent.is_dir():
        raise UsageError(f"--out: there is no folder {path.parent}")


def write_picture(picture: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a picture and says where."""
    try:
        picture.savefig(path, dpi=dpi)
    except OSError as error:
        raise UsageError(f"cannot write the picture {path}: {error}") from error
    Console().print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)


def run(main: Callable[[Any], Any], options: type[Any]) -> Any:
    """Reads the options, checks them, and hands them to `main`; returns what it returns."""
    try:
        chosen = tyro.cli(options)
        chosen.check()
        return main(chosen)
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
