"""Statistics of another domain: AdaBN, and mixing with the source's by a prior.

Li et al. 2016, arXiv:1603.04779 (AdaBN); Schneider et al. 2020, arXiv:2006.16971 (mixing). With
source statistics worth N examples, and n examples of the target,

    mean = N / (N + n) mean_source + n / (N + n) mean_target
    var  = N / (N + n) var_source  + n / (N + n) var_target

When to use: a trained model with batch norms meets data of the same task that look different, from
another scanner, in other light; labels are not needed. With few target examples a prior keeps their
noise out. Not where the target's classes are in other proportions than the source's: their shares
move the statistics as well.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.tools.adapter.calling import Call, on_batch
from jaxnorm.tools.adapter.evidence import Blend
from jaxnorm.tools.adapter.norms import Only
from jaxnorm.tools.statistics.passes import Batches, Order, RunningVar, Study


def adapt_stats(
    model: Any,
    batches: Batches,
    *,
    prior_strength: float = 0.0,
    call: Call = on_batch,
    order: Order = "together",
    examples: Callable[[Any], ArrayLike] | None = None,
    running_var: RunningVar = None,
    only: Only = None,
    progress: bool | None = None,
) -> Any:
    """Adapts the statistics of a model's norms to data of another domain, without labels.

        stats = N / (N + n) source + n / (N + n) target,   N = prior_strength, n target examples

    for mean and variance (or covariance) of all norms with stored statistics. No other variable
    changes.

    Args:
        model: a Linen module bound to its variables, `module.bind(variables)`, or an `nnx.Module`,
            with the statistics of the source.
        batches: data of the target, as in `population_stats`.
        prior_strength: N, how many examples the source's statistics are worth. 0 takes the target's
            alone, which is AdaBN; infinity leaves the source's.
        call: how the model is called on a batch, in inference, as in `population_stats`.
        order: what a norm normalizes by while the norms after it are studied. `"together"`: by its
            batch, or with a prior by the mixture of source and batch, n then being the examples of
            that batch. `"layer by layer"`: by what it finally stores, in several passes.
        examples: how many examples a batch has, a function of the batch, for n. None for the size
            of the first axis of its arrays. Pixels and time steps do not count as examples.
        running_var, only, progress: as in `population_stats`.

    Returns:
        A model of the same kind, as from `population_stats`.

    Raises:
        TypeError, ValueError: as `population_stats`; also for a prior strength that is no number
            from 0, and for batches of which it is not known how many examples they have.

    Numerics:
        As `population_stats`. Mixed in the dtype of the stored statistics.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import adapt_stats
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))  # of the source: mean 0, variance 1
        >>> target = [jnp.array([[8.0], [12.0]])]
        >>> adapt_stats(norm, target).mean[...].round(3).tolist()
        [10.0]
        >>> adapt_stats(norm, target, prior_strength=2).mean[...].round(3).tolist()
        [5.0]

    Source:
        Li et al. 2016 (arXiv:1603.04779), Algorithm 1; Schneider et al. 2020 (arXiv:2006.16971),
        section 3, for the mixture. For one batch both orders are what the latter does.

    Differs:
        From AdaBN, which goes neuron by neuron: that is `order="layer by layer"`. `AdaBN` layers
        (`jaxnorm.linen`, `jaxnorm.nnx`) adapt the domain that the call names, and are mixed with
        what is stored for that domain.
    """
    who = "adapt_stats"
    strength = _strength(prior_strength, who)
    return Study(
        model,
        batches,
        who,
        call=call,
        order=order,
        running_var=running_var,
        only=only,
        progress=progress,
        examples=examples or (lambda batch: _first_axis(batch, who) if strength else 0.0),
        blend=(lambda number: mixture(strength, number)) if strength else None,
    ).adapted()


def batch_adapter(
    model: Any,
    example: Any,
    *,
    prior_strength: float = 0.0,
    call: Call = on_batch,
    examples: Callable[[Any], ArrayLike] | None = None,
    running_var: RunningVar = None,
    only: Only = None,
) -> Callable[[Any], Any]:
    """Makes a function that calls a model with its statistics adapted to each batch by itself.

        stats = N / (N + n) source + n / (N + n) batch,   N = prior_strength, n examples in it

    Nothing is learned from one batch for the next. `adapt_stats` with that batch, in either order,
    and a call of the model it gives, is the same in several steps.

    Args:
        model: a Linen module bound to its variables, or an `nnx.Module`, with the statistics of the
            source.
        example: a batch, of any size, by which the norms of the model are found.
        prior_strength, call, examples, running_var, only: as in `adapt_stats`.

    Returns:
        A pure function of a batch that returns what `call` does. It is compiled, once for each
        shape, and works inside of `jax.jit`, `jax.lax.scan` and `jax.lax.map`.

    Raises:
        TypeError, ValueError: as `adapt_stats`.

    Numerics:
        As the norms of the model.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import batch_adapter
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> batches = jnp.array([[[8.0], [12.0]], [[0.0], [2.0]]])
        >>> jax.lax.map(batch_adapter(norm, batches[0]), batches).round(3).ravel().tolist()
        [-1.0, 1.0, -1.0, 1.0]

    Source:
        Schneider et al. 2020 (arXiv:2006.16971), section 3.
    """
    who = "batch_adapter"
    strength = _strength(prior_strength, who)
    study = Study(
        model,
        [example],
        who,
        call=call,
        order="together",
        running_var=running_var,
        only=only,
        progress=False,
        examples=examples or (lambda batch: _first_axis(batch, who) if strength else 0.0),
        blend=lambda number: mixture(strength, number),
    )
    return study.by_each_batch()


def mixture(strength: float, examples: ArrayLike) -> Blend:
    """Mixes statistics of a source worth `strength` examples with those of target examples."""

    def mix(source: Any, target: Any) -> Any:
        def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
            if not strength:
                return new
            # N / (N + n), also at an infinite N.
            share = 1 / (1 + jnp.asarray(examples, jnp.finfo(old.dtype).dtype) / strength)
            return share * old + (1 - share) * new

        return jax.tree.map(leaf, source, target)

    return mix


def _strength(prior_strength: Any, who: str) -> float:
    message = (
        f"{who}: prior_strength={prior_strength!r} must be a number from 0, of how many examples "
        f"the source's statistics are worth. Use prior_strength=0 for the target's alone."
    )
    if isinstance(prior_strength, str):
        raise TypeError(message)
    try:
        strength = float(prior_strength)
    except (TypeError, ValueError) as error:  # what JAX raises on tracers is a TypeError
        raise TypeError(message) from error
    if math.isnan(strength) or strength < 0:
        raise ValueError(message)
    return strength


def _first_axis(batch: Any, who: str) -> float:
    """The size of the first axis of all arrays of a batch."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{who}: the arrays of a batch have the shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]}, by which it is not known how "
            f"many examples they are. Say so: examples=lambda batch: len(batch['image'])."
        )
    return float(*sizes.pop())
