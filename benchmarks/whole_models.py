"""Training steps of whole models with this library's norms and with Flax's."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from benchmarks import models
from benchmarks.layers import run_to_end
from benchmarks.models import Model
from benchmarks.peers import FLAX, OURS
from benchmarks.timing import AGAIN, Effort, Times, interleaved
from jaxnorm import linen as jnn

LIBRARIES = {OURS: jnn, FLAX: nn}


@dataclass
class ModelResult:
    """One model in one dtype.

    Attributes:
        name: of the model.
        dtype: of its activations.
        times: of a training step, with the norms of each library.
        temporaries: bytes besides arguments and results.
        traced: seconds of tracing and lowering, once.
        compiled: seconds of compiling, once.
    """

    name: str
    dtype: str
    times: Times
    temporaries: dict[str, int]
    traced: dict[str, float]
    compiled: dict[str, float]


def measure(name: str, model: Model, dtype: str, effort: Effort) -> ModelResult:
    """Compiles and times one model with the norms of both libraries; Flax's twice."""
    ways, temporaries, traced, compiled = {}, {}, {}, {}
    x, labels = models.batch_of(model.shape, dtype)
    for library, classes in LIBRARIES.items():
        step, params, state = models.training_step(models.module_of(model, classes, dtype), x)
        jax.clear_caches()  # so that no library finds traced what another one has met before
        start = time.perf_counter()
        lowered = jax.jit(step).lower(params, state, x, labels)
        middle = time.perf_counter()
        program: Any = lowered.compile()
        traced[library] = middle - start
        compiled[library] = time.perf_counter() - middle
        temporaries[library] = program.memory_analysis().temp_size_in_bytes
        ways[library] = partial(run_to_end, program, (params, state, x, labels))
    ways[FLAX + AGAIN] = ways[FLAX]
    times = interleaved(ways, effort)
    return ModelResult(name, dtype, times, temporaries, traced, compiled)
