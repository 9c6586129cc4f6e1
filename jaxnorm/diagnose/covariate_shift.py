"""Internal covariate shift as a change of gradients.

Use it to see how much the layers below a layer spoil its step by making their own: the layer's
gradient was taken before they moved.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.diagnose import trees
from jaxnorm.diagnose.trees import Params


class CovariateShift(NamedTuple):
    """How a layer's gradient changes by the step of the layers before it.

    Attributes:
        distance: |G - G'|, the l2 distance of the gradients before and after.
        cosine: of the angle between them; NaN where one of them is 0.
    """

    distance: jax.Array
    cosine: jax.Array


def covariate_shift(
    loss_of: Callable[[Mapping[str, Params]], jax.Array],
    before: Mapping[str, Params],
    after: Mapping[str, Params],
    layers: Sequence[str],
) -> dict[str, CovariateShift]:
    """The internal covariate shift of each layer in one step of the training.

        G_i  = gradient by W_i of L(W_1,  ..., W_(i-1),  W_i, ..., W_k)
        G'_i = gradient by W_i of L(W_1', ..., W_(i-1)', W_i, ..., W_k)

    where W are the parameters before the step and W' those after it.

    Args:
        loss_of: of parameters, a scalar; on the same data and with the same keys each time.
        before: mapping from the name of a layer to its parameters, a pytree of floating point
            arrays: those before the step.
        after: the same after the step.
        layers: the names of all layers in the order of the network, from its input on. A
            normalization's parameters belong to the layer that it is part of.

    Returns:
        A `CovariateShift` for each layer. That of the first is 0, up to rounding.

    Raises:
        TypeError: `before` holds arrays without gradient.
        ValueError: the loss is no scalar, `layers` are not the names in `before`, or `after` is not
            like `before`.

    Numerics: takes the gradients one after the other in a loop, in the memory of one; lengths and
        products are added up in float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm.diagnose import covariate_shift
        >>> def loss_of(w):
        ...     return 0.5 * (w["second"] * w["first"] * 2.0 - 1.0) ** 2
        >>> before = {"first": jnp.array(1.0), "second": jnp.array(1.0)}
        >>> after = {"first": jnp.array(0.5), "second": jnp.array(0.5)}
        >>> found = covariate_shift(loss_of, before, after, ["first", "second"])
        >>> float(found["second"].distance)  # the gradient goes from 2 to 0
        2.0

    Source: Santurkar et al. 2018, arXiv 1805.11604, definition 2.1.

    Differs: from Ioffe and Szegedy's sense of the word, the change of the distribution of a layer's
        inputs, which `input_shift` measures.
    """
    who = "covariate_shift"
    trees.check_loss(loss_of, before, who)
    _check_layers(before, after, layers, who)
    gradient = jax.grad(loss_of)(dict(before))

    def moved(count: jax.Array) -> dict[str, CovariateShift]:
        """Of all layers when the first `count` have made their step."""
        mixed = {
            name: jax.tree.map(partial(jnp.where, number < count), after[name], before[name])
            for number, name in enumerate(layers)
        }
        changed = jax.grad(loss_of)(mixed)
        return {name: _shift(gradient[name], changed[name]) for name in layers}

    found = lax.map(moved, jnp.arange(len(layers)))
    # Of layer i, what it is after the i layers before it have moved.
    return {
        name: jax.tree.map(itemgetter(number), found[name]) for number, name in enumerate(layers)
    }


def _shift(first: Params, second: Params) -> CovariateShift:
    cosine = trees.dot(first, second) / (trees.norm(first) * trees.norm(second))
    return CovariateShift(trees.distance(first, second), cosine)


def _check_layers(
    before: Mapping[str, Params], after: Mapping[str, Params], layers: Sequence[str], who: str
) -> None:
    if sorted(layers) != sorted(before):
        raise ValueError(
            f"{who}: layers names {list(layers)}, and before has {sorted(before)}. Name each layer "
            f"once, in the order of the network: layers={sorted(before)}."
        )
    shapes = [jax.tree.map(jnp.shape, dict(one)) for one in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{who}: after has shapes {shapes[1]}, before {shapes[0]}. Give the parameters of the "
            f"same network: {who}(loss_of, params, new_params, layers)."
        )
