"""Whether a folded model does what the one it was made of does.

The outputs on an example may not show it: an example of zeros, or an `argmax`, shows nothing. So
each folded layer is tried on noise as well, of the shape, dtype and scale of its input, and what it
makes is compared with what its norm made.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.tools.adapter.marks import arrays_in, harvest, mark
from jaxnorm.tools.adapter.models import Arrays, LayerCall, Model, Path, Run
from jaxnorm.tools.folding.pairing import Pair


class Difference(NamedTuple):
    """How far apart two outputs are.

    Attributes:
        absolute: the largest absolute difference of two numbers.
        relative: the same, divided by the largest number of the first output.
    """

    absolute: float
    relative: float


class Comparison(NamedTuple):
    """How far apart two models are.

    Attributes:
        outputs: on the example.
        on_noise: the same with noise for the input of each folded layer.
        pairs: what norms make of noise that the layers before them get, by the paths of the norms.
    """

    outputs: Difference
    on_noise: Difference
    pairs: dict[Path, Difference]


def compared(
    before: Model, after: Model, pairs: Mapping[Path, Pair], run: Run, who: str
) -> Comparison:
    """How far apart a model and the folded one are.

    Raises:
        ValueError: the model's outputs on the example are no numbers.
    """
    layers = {pair.layer.call.path: path for path, pair in pairs.items()}
    olds = _values(before, run, {path: path for path in pairs}, layers)
    news = _values(after, run, layers, layers)
    broken = sum(int(np.isnan(old).sum()) for old in olds[0].outputs)
    if broken:
        size = sum(old.size for old in olds[0].outputs)
        raise ValueError(
            f"{who}: of {size} numbers that the model given returns for the example, {broken} are "
            f"NaN, by which the folded model cannot be compared with it. Look for the cause in its "
            f"variables, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), variables), or give "
            f"another example."
        )
    shown, noise = (
        _difference(old.outputs, new.outputs) for old, new in zip(olds, news, strict=True)
    )
    of_pairs = {path: _difference([olds[1].pairs[path]], [news[1].pairs[path]]) for path in pairs}
    return Comparison(shown, noise, of_pairs)


class _Values(NamedTuple):
    """What a model returns, and what it makes in some places, in double precision."""

    outputs: list[np.ndarray]
    pairs: dict[Path, np.ndarray]


def _values(
    model: Model, run: Run, shown: Mapping[Path, Path], tried: Mapping[Path, Any]
) -> list[_Values]:
    """The values on the example, and with noise for the inputs of the layers `tried`.

    Args:
        shown: by the paths of layers the names of what they make.
    """

    def noted(arrays: Arrays, noisy: jax.Array) -> Any:
        def hook(call: LayerCall) -> Any:
            x = jnp.where(noisy, _noise(call.x), call.x) if call.path in tried else call.x
            y = call.proceed(x)
            if call.path in shown:
                mark((shown[call.path],), *jax.tree.leaves(y))
            return y

        return arrays_in(model.run(arrays, run, hook))

    values = []
    program = jax.jit(harvest(noted, every_branch=True))
    for noisy in (False, True):
        # Noise may take other parts of a model where it has never been.
        still = jax.debug_nans(False) if noisy else contextlib.nullcontext()
        with jax.default_matmul_precision("highest"), still:
            out, places = program(model.arrays, jnp.asarray(noisy))
        outputs = [_wide(leaf) for leaf in out if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        pairs = {place.label[0]: _wide(*place.values) for place in places}
        values.append(_Values(outputs, pairs))
    return values


def _noise(x: Any) -> jax.Array:
    """Noise of the shape, dtype and largest magnitude of an array."""
    x = jnp.asarray(x)
    key = jax.random.key(0, impl="rbg")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.random.bernoulli(key, shape=x.shape).astype(x.dtype)
    size = jnp.abs(x).astype(jnp.float32)
    largest = jnp.max(jnp.where(jnp.isfinite(size), size, jnp.zeros_like(size)), initial=0.0)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return (scale * jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0)).astype(x.dtype)


def _wide(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf).astype(np.complex128 if jnp.iscomplexobj(leaf) else np.float64)


def _difference(olds: list[np.ndarray], news: list[np.ndarray]) -> Difference:
    absolute = max(map(_apart, olds, news), default=0.0)
    largest = max(
        (float(np.abs(old[np.isfinite(old)]).max(initial=0.0)) for old in olds), default=0.0
    )
    return Difference(absolute, absolute / largest if largest else absolute)


def _apart(old: np.ndarray, new: np.ndarray) -> float:
    """The largest difference; none where both are the same, be it infinite or no number."""
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    distance = np.abs(np.subtract(old, new, out=np.zeros_like(old), where=~same))
    return float(np.nan_to_num(distance, nan=np.inf, posinf=np.inf).max(initial=0.0))
