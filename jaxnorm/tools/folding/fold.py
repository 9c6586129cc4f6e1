"""Folding the batch norms of a whole model into its convolutions and dense layers.

For inference: in it batch norm is a fixed scale and shift of each feature, which the layer before
it can do itself, see `fold_pair.py`. The pairs are found in a trace of the model, by following the
data (`dataflow.py`, `pairing.py`), never by names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from jaxnorm.core import precision
from jaxnorm.core.moments import Stats
from jaxnorm.tools.adapter.calling import example_call, first_line
from jaxnorm.tools.adapter.kinds import spec_of
from jaxnorm.tools.adapter.lookalikes import lookalikes
from jaxnorm.tools.adapter.marks import arrays_in
from jaxnorm.tools.adapter.models import Arrays, Model, Path, Run, model_of
from jaxnorm.tools.adapter.norms import NORMS, Only, chosen
from jaxnorm.tools.folding.comparison import Comparison, Difference, compared
from jaxnorm.tools.folding.dataflow import dataflow
from jaxnorm.tools.folding.fold_pair import fold_pair
from jaxnorm.tools.folding.folded_layers import (
    NotHandedOver,
    as_folded_model,
    folded_layer,
    skipped,
)
from jaxnorm.tools.folding.pairing import Pair, Pairing

MOST_ROUNDING = 0.1
"""No difference above is told to be rounding."""


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model without the batch norms that could be folded.

    Attributes:
        model: of the kind that was given. In Linen it is bound to its variables; `model.unbind()`
            gives the module and them. In NNX it is in inference (`eval`).
        pairs: by the paths of the norms that are gone, the layers that do their work.
        left: by the paths of the norms that are still there, the reason why.
        difference: between the outputs of the two models on the example.
    """

    model: Any = dataclasses.field(repr=False)
    pairs: Mapping[str, str]
    left: Mapping[str, str]
    difference: Difference

    def __str__(self) -> str:
        lines = [
            f"folded {len(self.pairs)} of {len(self.pairs) + len(self.left)} norms; the outputs "
            f"differ by {self.difference.absolute:.1e}, {self.difference.relative:.1e} of the "
            f"largest"
        ]
        for heading, rows in (("norm, folded into", self.pairs), ("norm, left because", self.left)):
            if rows:
                first, second = heading.split(", ")
                width = max(map(len, (first, *rows)))
                lines += ["", f"{first:{width}}  {second}"]
                lines += [f"{path:{width}}  {what}" for path, what in rows.items()]
        return "\n".join(lines)


def fold(
    model: Any,
    *args: Any,
    only: Only = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Folded:
    """Folds the batch norms of a model into the layers before them, for inference.

        norm(layer(x; K, b)) = layer(x; K s, (b - mean) s + offset)
        s = scale / sqrt(var + epsilon)

    Into convolutions of one to three axes, strided, dilated, grouped or depthwise, transposed ones,
    and dense layers of all kinds. The norms are those that normalize each feature by stored
    statistics: Flax's `BatchNorm`, and `BatchNorm`, `BatchRenorm` and `AdaBN` of this library, the
    latter for the domain of the example call. A norm that is not folded stays, and `left` says why.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`.
        *args, **kwargs: an example call of the model for inference, for a Linen module with what
            says so, such as `train=False`. NNX models are put into `eval`. By this call it is seen
            which layer feeds which norm, and by it the two models are compared, once more with
            noise for the input of each folded layer.
        only: which norms: a pattern of paths, `"block1/*"`, a function of the path, or None for
            all.
        tolerance: how far the outputs may differ, relative to the largest; None for the square root
            of the machine epsilon of the narrowest dtype that layers and norms are stored in,
            compute in and return, or that what follows them computes in: 3e-4 in float32.

    Returns:
        The model, which norms went where, which are left and why, and how far the outputs differ;
        see `Folded`. It shares no arrays with the one given, which stays as it is. It is for calls
        that use layers and norms together as the example did; a call that uses one without the
        other, such as with another flag, for training, or for another domain, is an error.

    Raises:
        TypeError: a model that is none; traced arrays, by which nothing can be compared.
        ValueError: a Linen module without variables; `only` that means no norm; an example that the
            model does not take, or for which it returns NaN; outputs, or what a folded layer makes
            of noise, that differ more than `tolerance`.

    Numerics:
        The new weights are computed in float32 or wider and rounded once, to the dtypes of the old.
        For the comparison products are taken at the highest precision.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import fold
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        >>> folded = fold(model, jnp.ones((1, 2)))
        >>> dict(folded.pairs), dict(folded.left)
        ({'layers/1': 'layers/0'}, {})

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.1, Algorithm 2: in inference the
        normalization is a linear transform, composed with the one before it.
    """
    who = "fold"
    adapter = model_of(model, who)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((adapter.arrays, args, kwargs))):
        raise TypeError(
            f"{who}: found traced arrays, but compares the outputs of two models. Call it outside "
            f"of jax.jit and other transformations."
        )

    run = example_call(args, kwargs, who)
    flow = dataflow(adapter, run)
    norms = {p.call.path: p.call.layer for p in flow.places if isinstance(p.call.layer, NORMS)}
    similar = {path: each for path, each in lookalikes(adapter, run).items() if each.kind}
    norms |= similar
    pairing = Pairing(adapter, flow, chosen(norms, only, who) if norms else ())
    shared = _shared(model, pairing.pairs) if isinstance(model, nnx.Module) else {}
    own = {path: pair for path, pair in pairing.pairs.items() if path not in shared}
    pairs, in_use = _without_reads(model, adapter, own, run)

    def comparison(pairs: Mapping[Path, Pair]) -> tuple[Any, Comparison]:
        folded = _without_norms(model, adapter, pairs, run)
        return folded, compared(adapter, model_of(folded, who), pairs, run, who)

    folded, found = comparison(pairs)
    after = flow.rounding_after([pair.norm for pair in pairs.values()])
    limits = {
        path: pair.rounding**0.5 if tolerance is None else tolerance for path, pair in pairs.items()
    }
    for path, pair in pairs.items():
        if found.pairs[path].relative > limits[path]:
            layer = "/".join(pair.layer.call.path)
            what = f"what '{layer}' makes of noise and what the two made of it"
            raise ValueError(f"{who}: {_too_far(what, found.pairs[path], limits[path], path)}")
    apart = max(found.outputs, found.on_noise, key=lambda difference: difference.relative)
    limit = max([after**0.5, *limits.values()]) if tolerance is None else tolerance
    if pairs and apart.relative > limit:
        alone = {
            path: max(difference.relative for difference in comparison({path: pair})[1][:2])
            for path, pair in pairs.items()
        }
        worst = max(alone, key=lambda path: alone[path])
        raise ValueError(f"{who}: {_too_far('the outputs', apart, limit, worst)}")
    left = pairing.left | shared | in_use | {path: each.why for path, each in similar.items()}
    return Folded(
        model=folded,
        pairs={"/".join(p): "/".join(pair.layer.call.path) for p, pair in pairs.items()},
        left={"/".join(path): reason for path, reason in left.items()},
        difference=found.outputs,
    )


def _too_far(what: str, found: Difference, limit: float, worst: Path) -> str:
    """What to say of a difference that is too large, and of the norm that makes most of it."""
    name = "/".join(worst)
    fix = f"Leave it, only=lambda path: path != '{name}'"
    if found.relative <= min(10 * limit, MOST_ROUNDING):
        fix += f", or accept the rounding: tolerance={2 * found.relative:.0e}"
    return (
        f"{what} differ by {found.relative:.1e} of the largest, more than tolerance={limit:.1e}. "
        f"The norm '{name}' alone makes the largest part. {fix}."
    )


def _shared(given: nnx.Module, pairs: Mapping[Path, Pair]) -> dict[Path, str]:
    """Why norms are left whose layers share variables, be it with layers not called here."""
    modules = {tuple(map(str, path)): module for path, module in nnx.iter_modules(given)}
    reasons = {}
    for path, pair in pairs.items():
        layer = pair.layer.call.path
        for name in {"kernel", "bias"} & pair.keys.keys():
            variable = vars(modules[layer])[name]
            holders = [
                f"'{'/'.join(other)}'"
                for other, module in modules.items()
                if other != layer and any(value is variable for value in vars(module).values())
            ]
            if holders:
                reasons[path] = (
                    f"the {name} of '{'/'.join(layer)}' is also that of {', '.join(holders)}"
                )
    return reasons


def _without_reads(
    given: Any, model: Model, pairs: Mapping[Path, Pair], run: Run
) -> tuple[dict[Path, Pair], dict[Path, str]]:
    """The pairs without which the model can be called, and of others why it cannot.

    Its code may ask the norm for what is gone, variables that nothing depends on or an option.
    """

    def failure(pairs: Mapping[Path, Pair]) -> str | None:
        new = model_of(_without_norms(given, model, pairs, run), model.who)
        try:
            jax.eval_shape(
                lambda arrays: arrays_in(new.run(arrays, run, lambda call: call.proceed(call.x))),
                new.arrays,
            )
        except (TypeError, ValueError) as error:  # see `example_call`
            cause = error.__cause__
            if isinstance(cause, NotHandedOver):
                return "its input is used as an array on the way to it: cast it by x.astype(dtype)"
            reason = first_line(cause if isinstance(cause, Exception) else error)
            return f"the model cannot be called without it: {reason}"
        return None

    if not failure(pairs):
        return dict(pairs), {}
    reasons = {path: failure({path: pair}) for path, pair in pairs.items()}
    left = {path: reason for path, reason in reasons.items() if reason}
    return {path: pair for path, pair in pairs.items() if path not in left}, left


def _without_norms(given: Any, model: Model, pairs: Mapping[Path, Pair], run: Run) -> Any:
    """The model with these norms folded."""
    is_nnx = isinstance(given, nnx.Module)
    originals = model.known_layers(run) if is_nnx else {}
    arrays, layers = dict(model.arrays), {}
    for path, pair in pairs.items():
        layer = pair.layer.call
        kernel, bias = _folded(pair, model.arrays)
        arrays[pair.keys["kernel"]] = kernel
        arrays[(*pair.keys["kernel"][:-1], "bias")] = bias
        name, before = "/".join(path), originals.get(layer.path, layer.layer)
        layers[layer.path] = folded_layer(before, "/".join(layer.path), name, bias)
        layers[path] = skipped(pair.norm.call.layer, name, pair.dtype, pair.domain)
        if not is_nnx:
            gone = {model.key(path, name) for name in pair.norm.call.values}
            arrays = {key: leaf for key, leaf in arrays.items() if key not in gone}
    new = model.rebuilt(arrays, layers)
    if is_nnx:
        new.eval()
    return as_folded_model(new) if is_nnx and pairs else new


def _folded(pair: Pair, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The new kernel and bias of the layer of a pair."""
    spec = spec_of(pair.norm.call.layer)
    values = {role: arrays[key] for role, key in pair.keys.items()}
    stacked = range(pair.stacked)
    # The norm's variables have the axes of a stack, then those of its features.
    own = (*stacked, *(pair.stacked + axis for axis in pair.norm_axes))
    rank = pair.stacked + len(pair.kernel_axes)

    def along(role: str) -> jax.Array | None:
        if role not in values:
            return None
        value = jnp.asarray(values[role])
        return jnp.expand_dims(value, [axis for axis in range(rank) if axis not in own])

    scale = along("scale")
    if scale is not None and getattr(spec, "zero_centered_scale", False):
        scale = scale.astype(precision.accumulation_dtype(scale.dtype)) + 1
    var = along("var")
    assert var is not None
    return fold_pair(
        values["kernel"],
        values.get("bias"),
        Stats(along("mean"), var),
        scale,
        along("offset"),
        epsilon=spec.epsilon,
        output_axes=(*stacked, *(pair.stacked + axis for axis in pair.kernel_axes)),
    )
