"""Eight CPU devices, strict ranks and no warnings, for the whole suite."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Scripts that write down what other frameworks return, and need these.
collect_ignore_glob = ["record_*.py", "mutants/*"]


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
