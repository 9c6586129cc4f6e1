"""What a library costs besides its arithmetic: imports, tracing, compiling, calls without jit."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models, oracle
from benchmarks.cases import METHODS, Case
from benchmarks.flax_layers import class_of, linen_layer, linen_module, nnx_module
from benchmarks.functional import training_step
from benchmarks.peers import FLAX, OURS, is_installed
from benchmarks.timing import AGAIN, Effort, Times, interleaved, rotated

# This library's and Flax's modules, of the two kinds.
LIBRARIES = {
    "Linen": {OURS: "jaxnorm.linen", FLAX: "flax.linen"},
    "NNX": {OURS: "jaxnorm.nnx", FLAX: "flax.nnx"},
}
IMPORTS = ("jaxnorm", "jaxnorm.linen", "jaxnorm.nnx", "flax.linen", "flax.nnx", "haiku", "equinox")


def import_times(rounds: int) -> Times:
    """Seconds of imports that come after `import jax`, each in a fresh process."""
    names = [name for name in IMPORTS if is_installed(name.split(".")[0])]
    times = Times({name: [] for name in names})
    for number in range(rounds):
        for name in rotated(names, number):
            program = (
                "import time, jax; start = time.perf_counter(); "
                f"import {name}; print(time.perf_counter() - start)"
            )
            run = [sys.executable, "-c", program]
            found = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
            times.seconds[name].append(float(found.stdout))
    return times


@dataclass
class Stages:
    """How long it takes until a training step can run.

    Attributes:
        name: of the model.
        traced: tracing and lowering.
        compiled: compiling what was lowered.
    """

    name: str
    traced: Times
    compiled: Times


def seconds_of_stages(function: Callable, arguments: tuple) -> tuple[float, float]:
    """Of tracing and lowering, and of compiling, without anything kept from before."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


Makers = dict[str, Callable[[], tuple[Callable, tuple]]]
"""For each way, what gives a function and arguments for it."""


def stages_of(name: str, makers: Makers, warm_up: Makers, rounds: int) -> Stages:
    """Times of tracing and compiling; Flax's twice. What is to warm up runs once, unmeasured."""
    for make in warm_up.values():
        seconds_of_stages(*make())
    made = {way: make() for way, make in makers.items()}
    made[FLAX + AGAIN] = made[FLAX]
    traced, compiled = (Times({way: [] for way in made}) for _ in range(2))
    for number in range(rounds):
        for way in rotated(list(made), number):
            for times, seconds in zip(
                (traced, compiled), seconds_of_stages(*made[way]), strict=True
            ):
                times.seconds[way].append(seconds)
    return Stages(name, traced, compiled)


def one_layer(library: str, case: Case):
    """A training step of a Linen layer, with arguments."""
    x = jnp.zeros(case.shape, case.dtype)
    layer = linen_layer(library, case.method, x)
    return training_step(layer), (layer.params, layer.state, x, x)


def many_layers(kind: str, library: str, method: str, layers: int):
    """A training step of a model with a norm in each layer, with arguments."""
    x, labels = models.batch_of((32, 64), "float32")
    if kind == "NNX":
        module = models.NNXFiftyNorms(class_of(library, method), layers=layers)
        step, params, state = models.nnx_training_step(module)
    else:
        norm = partial(linen_module, library, method, jnp.float32, True)
        step, params, state = models.training_step(models.FiftyNorms(norm, layers=layers), x)
    return step, (params, state, x, labels)


DEEP = (
    ("Linen", "BatchNorm"),
    ("Linen", "LayerNorm"),
    ("Linen", "RMSNorm"),
    ("Linen", "GroupNorm"),
    ("NNX", "BatchNorm"),
)


def stages_of_layers(methods: tuple[str, ...], rounds: int) -> list[Stages]:
    """Of one layer of each method."""
    found = []
    for method in methods:
        case = Case(method, METHODS[method][-1], "float32")
        makers: Makers = {
            library: partial(one_layer, path, case) for library, path in LIBRARIES["Linen"].items()
        }
        found.append(stages_of(method, makers, makers, rounds))
    return found


def stages_of_models(
    layers: int, rounds: int, deep: Sequence[tuple[str, str]] = DEEP
) -> list[Stages]:
    """Of models with many norms; those with one norm warm up for them, which saves a round."""
    found = []
    for kind, method in deep:
        makers, warm_up = (
            {
                library: partial(many_layers, kind, path, method, number)
                for library, path in LIBRARIES[kind].items()
            }
            for number in (layers, 1)
        )
        name = f"{layers} times dense, {method}, relu ({kind})"
        found.append(stages_of(name, makers, warm_up, rounds))
    return found


def eager_way(kind: str, library: str, method: str) -> Callable[[], object]:
    """One call of a module in training, without jit."""
    x = jnp.asarray(oracle.draw(oracle.small_shape(method), 0))
    if kind == "NNX":
        layer: Any = nnx_module(library, method, x)
        return lambda: jax.block_until_ready(layer(x))
    module = linen_module(library, method, x.dtype, True)
    variables = module.init(jax.random.key(0), x)
    state = [name for name in variables if name != "params"]
    return lambda: jax.block_until_ready(module.apply(variables, x, mutable=state))


def eager_times(methods: tuple[str, ...], effort: Effort) -> dict[tuple[str, str], Times]:
    """By method and kind of module; Flax's twice."""
    found = {}
    for method in methods:
        for kind, libraries in LIBRARIES.items():
            ways = {name: eager_way(kind, path, method) for name, path in libraries.items()}
            ways[FLAX + AGAIN] = ways[FLAX]
            found[method, kind] = interleaved(ways, effort)
    return found


def recompiles(steps: int = 4) -> dict[tuple[str, str], int]:
    """Programs compiled after the first of some training steps, by library and kind."""
    compiled = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = {}
    for kind, libraries in LIBRARIES.items():
        for name, path in libraries.items():
            step, (params, state, x, labels) = many_layers(kind, path, "BatchNorm", layers=1)
            step = jax.jit(step)
            params, state = step(params, state, x, labels)
            before = len(compiled)
            for _ in range(steps - 1):
                params, state = step(params, state, x, labels)
            found[name, kind] = len(compiled) - before
    return found
