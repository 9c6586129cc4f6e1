"""How loss and gradient change along a step: how far a gradient can be trusted.

Use it during training to see whether a normalization, an initialization or a rate makes the loss
smoother where the training goes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.diagnose import trees
from jaxnorm.diagnose.trees import Params


class LossLandscape(NamedTuple):
    """Loss and gradient at points along one direction.

    A pytree, so that `jax.jit`, `jax.vmap` and `jax.tree.map` take it; a mapped axis comes first.

    Attributes:
        step_sizes: `[steps]`, how far each point lies along the direction, in its length.
        losses: `[steps]`, at each point.
        gradient_distances: `[steps]`, the l2 distance of the gradient there from that at the start:
            the less, the better the gradient predicts those to come.
        distances: `[steps]`, the l2 distance of the parameters there from those at the start.
        loss: at the start.
        gradient_norm: the l2 norm of the gradient at the start.
    """

    step_sizes: jax.Array
    losses: jax.Array
    gradient_distances: jax.Array
    distances: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array

    @property
    def loss_range(self) -> jax.Array:
        """The largest loss of the points less the smallest."""
        return jnp.max(self.losses, -1) - jnp.min(self.losses, -1)

    @property
    def smoothness(self) -> jax.Array:
        """The effective beta: the largest change of the gradient for the distance moved.

        Points that have not moved do not count; NaN if none has, or if a gradient is NaN.
        """
        moved = self.distances > 0
        ratios = self.gradient_distances / jnp.where(moved, self.distances, 1)
        largest = jnp.max(jnp.where(moved, ratios, -jnp.inf), -1)
        return jnp.where(moved.any(-1), largest, jnp.nan)


def loss_landscape(
    loss_of: Callable[[Params], jax.Array],
    params: Params,
    step_sizes: ArrayLike | Sequence[float],
    direction: Params | None = None,
) -> LossLandscape:
    """Loss and gradient at `params + step_size * direction`, for each step size.

        smoothness = max over steps of |g(x + d) - g(x)| / |d|,  d = step_size * direction

    Args:
        loss_of: of parameters, a scalar. It should return the same each time: with one batch, and
            with the same keys for what is drawn.
        params: pytree of floating point arrays, the start x.
        step_sizes: `[steps]`, numbers; in steps of gradient descent, multiples of the learning
            rate. With 0 among them the start counts in `loss_range`.
        direction: pytree like `params`; None takes the negative gradient at the start.

    Returns:
        A `LossLandscape`.

    Raises:
        TypeError: `params` holds arrays without gradient.
        ValueError: the loss is no scalar, `step_sizes` is not a list of one number or more, or
            `direction` is not like `params`.

    Numerics: points have the dtype of `params`, and distances are between the points as they are
        rounded; lengths are added up in float32 or wider. The points are taken one after the other
        in a loop, in the memory of one gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm.diagnose import loss_landscape
        >>> loss_of = lambda x: 0.5 * (x[0] ** 2 + 4 * x[1] ** 2)
        >>> found = loss_landscape(loss_of, jnp.array([0.0, 1.0]), [0.125, 0.25, 0.5])
        >>> found.losses.tolist()  # the second step ends in the minimum
        [0.5, 0.0, 2.0]
        >>> found.gradient_distances.tolist(), float(found.smoothness)
        ([2.0, 4.0, 8.0], 4.0)

    Source: Santurkar et al. 2018, arXiv 1805.11604, section 3.1 and figure 4.
    """
    who = "loss_landscape"
    trees.check_loss(loss_of, params, who)
    sizes = jnp.asarray(step_sizes, float)
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(
            f"{who}: step_sizes has shape {sizes.shape}, which is no list of one number or more. "
            f"Name them: step_sizes=[0.05, 0.1, 0.2]."
        )
    if direction is not None:
        _check_direction(direction, params, who)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    along = jax.tree.map(jnp.negative, gradient) if direction is None else direction

    def look(size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        there = jax.tree.map(
            lambda p, d: jnp.asarray(p + size * d, jnp.result_type(p)), params, along
        )
        its_loss, its_gradient = jax.value_and_grad(loss_of)(there)
        return (
            its_loss,
            trees.distance(its_gradient, gradient),
            trees.distance(there, params),
        )

    losses, changes, distances = lax.map(look, sizes)
    return LossLandscape(sizes, losses, changes, distances, loss, trees.norm(gradient))


def _check_direction(direction: Params, params: Params, who: str) -> None:
    def shapes(tree: Params) -> Params:
        return jax.tree.map(jnp.shape, tree)

    found, needed = shapes(direction), shapes(params)
    if found != needed:
        raise ValueError(
            f"{who}: direction has shapes {found}, params {needed}. Give a direction for each "
            f"parameter: direction=jax.tree.map(jnp.negative, gradient)."
        )
