"""Where a measurement was made, and of what."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import jax

import jaxnorm

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy")


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def line_of(path: str, pattern: str) -> str:
    """What a pattern finds in a file that some systems have."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return ""
    return found[1].strip() if found else ""


def description() -> str:
    """Processor, cores, memory, and how busy it is."""
    model = line_of("/proc/cpuinfo", r"model name\s*:(.*)") or platform.processor()
    device = jax.devices()[0]
    on = f"JAX on {device.device_kind} ({device.platform}). " if device.platform != "cpu" else ""
    kilobytes = line_of("/proc/meminfo", r"MemTotal:\s*(\d+)")
    memory = f", {int(kilobytes) / 2**20:.0f} GiB of memory" if kilobytes else ""
    return (
        f"{on}{model}, {threads()} of {os.cpu_count()} cores{memory}, {platform.system()}; "
        f"load before the start {os.getloadavg()[0]:.1f}"
    )


def commit() -> str:
    """The commit of the library, and whether its files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "jaxnorm"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "outside of its repository"
    return f"at {head}{' with changes' if changed else ''}"


def versions() -> str:
    """What the numbers depend on."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    ours = f"jaxnorm {jaxnorm.__version__} {commit()}"
    return ", ".join([f"Python {platform.python_version()}", *found, ours])
