"""Eight CPU devices, strict ranks, compiled programs kept; which cases of a test are slow."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest
from scripts import script

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A second run takes them from here, in less than half the time.
if jax.config.jax_compilation_cache_dir is None:
    cache = Path(__file__).parents[1] / "build" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Scripts that write down what other frameworks return, and need these.
collect_ignore_glob = ["record_*.py", "mutants/*"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The default run takes of each test as few cases as show every value of every parameter."""
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            cases[item.path, item.cls, item.originalname].append(item)
    for each in cases.values():
        shown = covering_part([values_of(item.callspec.params) for item in each])
        for i, item in enumerate(each):
            if i not in shown:
                item.add_marker(pytest.mark.slow)


def values_of(params):
    """The values of a case by their names; options in a dictionary are values of their own."""
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from ((name, key, repr(option)) for key, option in value.items())
        else:
            yield name, repr(value)


def covering_part(cases):
    """Indices of cases that together have all values; of equals, those seen least so far."""
    cases = [frozenset(case) for case in cases]
    missing, used, taken = frozenset().union(*cases), Counter(), set()
    while missing:
        best = max(
            range(len(cases)),
            key=lambda i: (len(cases[i] & missing), -sum(used[v] for v in cases[i]), -i),
        )
        taken.add(best)
        used.update(cases[best])
        missing -= cases[best]
    return taken


@pytest.fixture
def example(request):
    """The script that a file is about: `whitening` in `test_example_whitening.py`."""
    return script(request.path.stem.removeprefix("test_example_"))


@pytest.fixture
def quick_compile():
    """For tests of mathematics, where the time goes into compiling what runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Double precision inside one test."""
    with jax.enable_x64(True):
        yield
