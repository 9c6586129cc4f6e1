"""One layer at a time: are all right, how long do they take, what memory do they hold."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, oracle
from benchmarks.cases import FURTHER, Case
from benchmarks.functional import STEPS, pullback, training_step
from benchmarks.oracle import Errors
from benchmarks.peers import FLAX, OURS, Peer
from benchmarks.timing import AGAIN, Effort, Times, interleaved


@dataclass
class LayerResult:
    """One case and step.

    Attributes:
        case: method, size and dtype.
        step: training or evaluation.
        times: of each peer.
        temporaries: bytes besides arguments and results, over those of the input, of each peer.
    """

    case: Case
    step: str
    times: Times
    temporaries: dict[str, float]


def errors(peer: Peer, method: str, dtype: str) -> Errors:
    """How far the layer of a peer is from float64."""

    zeros = jnp.zeros(oracle.small_shape(method), dtype)
    layer = peer.layer(method, peer.arranged(method, zeros))
    step = jax.jit(training_step(layer))

    def run(x, dy):
        x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
        given = [peer.arranged(method, a) for a in (x, dy)]
        y, _, (_, dx) = step(layer.params, layer.state, *given)
        arrays = (x, dy, peer.restored(method, y), peer.restored(method, dx))
        return [np.asarray(a, np.float32) for a in arrays]

    return oracle.errors_of(method, dtype, run)


def result_dtype(peer: Peer, method: str, dtype: str) -> str:
    """The dtype of what a layer returns."""
    x = peer.arranged(method, jnp.zeros(oracle.small_shape(method), dtype))
    layer = peer.layer(method, x)
    return str(jax.eval_shape(layer.train, layer.params, layer.state, x)[0].dtype)


def lowered_step(peer: Peer, case: Case, step: str, x: Any, dy: Any):
    """A step of one layer, not yet compiled, and its arguments."""
    x, dy = (jax.block_until_ready(peer.arranged(case.method, a)) for a in (x, dy))
    layer = peer.layer(case.method, x)
    arguments = layer.params, layer.state, x, dy
    return jax.jit(STEPS[step](layer)).lower(*arguments), arguments


def run_to_end(program, arguments) -> None:
    """Runs a program and waits for its results."""
    jax.block_until_ready(program(*arguments))


def temporaries(program, unit: float) -> float:
    """Bytes that a program needs besides arguments and results, in units."""
    return program.memory_analysis().temp_size_in_bytes / unit


def measure(case: Case, step: str, peers: list[Peer], effort: Effort) -> LayerResult:
    """Times a step of one layer of each peer; what Flax does is timed twice."""
    x, dy = (jnp.asarray(a, case.dtype) for a in oracle.example(case))
    ways, held = {}, {}
    steps = [lowered_step(peer, case, step, x, dy) for peer in peers]
    with ThreadPoolExecutor(machine.threads()) as pool:
        programs = list(pool.map(lambda one: one[0].compile(), steps))
    for peer, program, (_, arguments) in zip(peers, programs, steps, strict=True):
        ways[peer.name] = partial(run_to_end, program, arguments)
        held[peer.name] = temporaries(program, x.nbytes)
    if FLAX in ways:
        ways[FLAX + AGAIN] = ways[FLAX]
    return LayerResult(case, step, interleaved(ways, effort), held)


def residuals(peer: Peer, case: Case) -> float:
    """Bytes that the backward pass holds until it runs, over those of the input."""
    x = peer.arranged(case.method, jnp.zeros(case.shape, case.dtype))
    layer = peer.layer(case.method, x)

    def held(params, state, x):
        return jax.tree.leaves(pullback(layer, params, state, x)[1])

    program = jax.make_jaxpr(held)(layer.params, layer.state, x).jaxpr
    # A value that is held twice is one array.
    different: dict[int, Any] = {id(value): value.aval for value in program.outvars}
    return sum(a.size * a.dtype.itemsize for a in different.values()) / x.nbytes


def measure_further(size: str, dtype: str, peers: list[Peer], effort: Effort) -> list[LayerResult]:
    """Training steps of the methods that only this library has."""
    ours = [peer for peer in peers if peer.name == OURS]
    return [measure(Case(method, size, dtype), "training", ours, effort) for method in FURTHER]
