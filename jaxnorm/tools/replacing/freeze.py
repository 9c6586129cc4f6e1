"""Freezing the norms of a model: their statistics in the layers, their affine in the optimizer.

Statistics that must not move are the matter of a layer: `freeze` puts layers in the place of a
model's norms that normalize by stored statistics whatever a call or `train()` says. A scale and
bias that must not move are the matter of an optimizer: `norm_labels`, `norm_mask` and `decay_mask`
tell Optax which parameters belong to norms.

When to use: fine-tuning on small batches, or on data that the statistics should not follow. Weight
decay pulls the scales of norms to 0, which has no use where a norm follows on a linear layer;
`decay_mask` spares them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxnorm.tools.adapter.kinds import keeps_statistics, spec_of
from jaxnorm.tools.adapter.lookalikes import Lookalike
from jaxnorm.tools.adapter.models import Model, Path, model_of
from jaxnorm.tools.adapter.norms import Only, chosen, norms_of
from jaxnorm.tools.replacing.frozen import frozen_layer


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model of which some norms are frozen; printed, it is a table of them.

    Attributes:
        model: of the kind that was given.
        frozen: by the path of a norm, what of it is frozen: `"statistics"`, `"scale"`, `"bias"`.
        left: by the path of a norm that was left as it was, why.
    """

    model: Any
    frozen: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]

    def __str__(self) -> str:
        rows = [(path, "frozen", ", ".join(what)) for path, what in self.frozen.items()]
        rows += [(path, "left", why) for path, why in self.left.items()]
        width = max(len(path) for path, *_ in rows)
        return "\n".join(f"{path:{width}}  {state:6}  {what}" for path, state, what in rows)


def freeze(
    model: Any,
    *args: Any,
    statistics: bool = True,
    affine: bool = False,
    only: Only = None,
    **kwargs: Any,
) -> FrozenModel:
    """A model whose norms do not move, in training.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias    with stored mean and var

    The frozen norms normalize by their stored statistics, and these stay, although the model is
    called for training. The rest of it trains as before, dropout included.

    Args:
        model: a Linen module bound to its variables, or an NNX module. It is not changed.
        *args, **kwargs: an example call of a Linen model, by which its layers are found. NNX needs
            none.
        statistics: whether stored statistics are frozen.
        affine: whether no gradient reaches scale and bias. What moves parameters without gradients,
            weight decay and momentum from before, still does: see `norm_labels`.
        only: which norms, a pattern of paths such as `"block1/*"`, in which a star stands for
            anything, also for `/`, or a function of the path; None for all.

    Returns:
        A `FrozenModel`: the model, and which norms are frozen and which are not. Variables have the
        same names as before. A Linen model is bound: `module, variables = frozen.model.unbind()`.

    Raises:
        TypeError: no model; an `only` that is no text and no function.
        ValueError: a Linen module without variables or without a call; nothing to freeze.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import freeze
        >>> model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
        >>> frozen = freeze(model, affine=True)
        >>> print(frozen)
        layers/0  frozen  statistics, scale, bias
        >>> frozen.model.train()
        >>> y = frozen.model.layers[0](jnp.array([[1.0, 2.0], [5.0, 4.0]]))
        >>> y.round(3).tolist(), frozen.model.layers[0].mean[...].tolist()
        ([[1.0, 2.0], [5.0, 4.0]], [0.0, 0.0])

    Differs:
        From `use_running_average=True` in a model's code: the model's code stays as it is. From
        Keras' `trainable=False` and detectron2's `FrozenBatchNorm2d`: scale and bias are frozen
        only where `affine` says so.
    """
    who = "freeze"
    known = model_of(model, who)
    norms = chosen(norms_of(known, model, args, kwargs, who), only, who)
    frozen: dict[str, tuple[str, ...]] = {}
    left: dict[str, str] = {}
    layers = {}
    for path, layer in norms.items():
        name = "/".join(path)
        if isinstance(layer, Lookalike):
            left[name] = layer.why
            continue
        stored = statistics and keeps_statistics(spec_of(layer))
        params = tuple(sorted(known.params_of(path), reverse=True)) if affine else ()
        if stored or params:
            layers[path] = frozen_layer(layer, statistics=stored, affine=bool(params))
            frozen[name] = ("statistics",) * stored + params
        else:
            left[name] = "keeps no statistics" if statistics else "has no scale and no bias"
    if not layers:
        fix = "Freeze scale and bias with affine=True, or choose other norms: only=None is all"
        if norms and all(isinstance(layer, Lookalike) for layer in norms.values()):
            fix = (
                "Freeze the parameters of such norms in the optimizer: "
                "optax.multi_transform(transforms, norm_labels(model, x))"
            )
        raise ValueError(
            f"{who}: statistics={statistics}, affine={affine} leave nothing to freeze in "
            f"{_described(left)}. {fix}."
        )
    return FrozenModel(known.rebuilt(known.arrays, layers), frozen, left)


def norm_mask(model: Any, *args: Any, only: Only = None, **kwargs: Any) -> Any:
    """Which parameters of a model belong to norms, as `optax.masked` takes it.

    Args:
        model: a Linen module bound to its variables, or an NNX module.
        *args, **kwargs: an example call of a Linen model, by which its layers are found. NNX needs
            none.
        only: which norms, a pattern of paths such as `"block1/*"`, in which a star stands for
            anything, also for `/`, or a function of the path; None for all.

    Returns:
        A tree of booleans in the form of the parameters, `variables["params"]` in Linen, that of
        `nnx.state(model, nnx.Param)` in NNX: True for each parameter of a chosen norm.

    Raises:
        TypeError: no model; an `only` that is no text and no function.
        ValueError: a Linen module without variables or without a call; no norm is meant; variables
            that look like a chosen norm's, with statistics or a scale, of a Linen layer that the
            example call does not reach. Call the model as in training, or if they are no norm's,
            leave them out by `only`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxnorm.tools import norm_mask
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
        >>> mask = norm_mask(model)
        >>> mask["layers"][0]["bias"], mask["layers"][1]["bias"]
        (False, True)
        >>> still = optax.chain(optax.adam(1e-3), optax.masked(optax.set_to_zero(), mask))
        >>> optimizer = nnx.Optimizer(model, still, wrt=nnx.Param)
    """
    known, mine = _norm_params(model, args, kwargs, only, "norm_mask")
    return known.optimized({key: key in mine for key in known.arrays})


def norm_labels(model: Any, *args: Any, only: Only = None, **kwargs: Any) -> Any:
    """Which parameters of a model belong to norms, as `optax.multi_transform` takes it.

    Args:
        model, *args, only, **kwargs: as in `norm_mask`.

    Returns:
        A tree in the form of the parameters: `"norm"` for each parameter of a chosen norm,
        `"other"` for the others.

    Raises:
        TypeError, ValueError: as `norm_mask`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxnorm.tools import norm_labels
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
        >>> transforms = {"norm": optax.set_to_zero(), "other": optax.adamw(1e-3)}
        >>> still = optax.multi_transform(transforms, norm_labels(model))
        >>> optimizer = nnx.Optimizer(model, still, wrt=nnx.Param)
    """
    known, mine = _norm_params(model, args, kwargs, only, "norm_labels")
    return known.optimized({key: "norm" if key in mine else "other" for key in known.arrays})


def decay_mask(
    model: Any, *args: Any, only: Only = None, biases: bool = False, **kwargs: Any
) -> Any:
    """Where weight decay belongs, as the `mask` of `optax.adamw` takes it.

    Args:
        model, *args, only, **kwargs: as in `norm_mask`. Other norms count as layers of any kind.
        biases: whether parameters named `bias` decay too. Those of chosen norms never do.

    Returns:
        A tree of booleans in the form of the parameters: True for those that decay.

    Raises:
        TypeError, ValueError: as `norm_mask`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from jaxnorm.tools import decay_mask
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
        >>> mask = decay_mask(model)
        >>> mask["layers"][0]["kernel"], mask["layers"][0]["bias"], mask["layers"][1]["scale"]
        (True, False, False)
        >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3, mask=mask), wrt=nnx.Param)
    """
    known, mine = _norm_params(model, args, kwargs, only, "decay_mask")
    return known.optimized(
        {key: key not in mine and (biases or key[-1] != "bias") for key in known.arrays}
    )


def _norm_params(
    model: Any, args: Any, kwargs: Any, only: Only, who: str
) -> tuple[Model, set[Path]]:
    """A model, and which of its arrays are parameters of the chosen norms."""
    known = model_of(model, who)
    norms = chosen(norms_of(known, model, args, kwargs, who), only, who)
    similar = {path: norm for path, norm in norms.items() if isinstance(norm, Lookalike)}
    missed = ["/".join(path) for path, norm in similar.items() if norm.kind is None]
    if missed:
        raise ValueError(
            f"{who}: {missed} have variables like norms, but are not called in the example call. "
            f"Call the model as in training: {who}(model.bind(variables, rngs={{'dropout': key}}), "
            f"x, train=True). If they are no norms: only=lambda path: path not in {missed}."
        )
    return known, {
        key
        for path in norms
        for name, key in known.params_of(path).items()
        if path not in similar or name in similar[path].params
    }


def _described(left: Mapping[str, str]) -> str:
    return ", ".join(f"'{path}' ({why})" for path, why in left.items()) or "a model without norms"
