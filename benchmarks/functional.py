"""A layer of any library as pure functions of flat lists of arrays.

Flat, since libraries keep their variables in containers that cost different time to take apart at
each call of a compiled function. In a model that is paid once for a step, not once for a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Arrays = list[jax.Array]


class Functional(NamedTuple):
    """A layer with its variables.

    Attributes:
        params: what is trained.
        state: running statistics.
        train: of parameters, state and input gives the output and the new state.
        evaluate: of the same gives the output.
    """

    params: Arrays
    state: Arrays
    train: Callable[[Arrays, Arrays, jax.Array], tuple[jax.Array, Arrays]]
    evaluate: Callable[[Arrays, Arrays, jax.Array], jax.Array]


def functional(
    params: Any,
    state: Any,
    train: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]],
    evaluate: Callable[[Any, Any, jax.Array], jax.Array],
) -> Functional:
    """From functions of a library's own containers."""
    params, of_params = jax.tree.flatten(params)
    state, of_state = jax.tree.flatten(state)

    def flat_train(params, state, x):
        y, state = train(of_params.unflatten(params), of_state.unflatten(state), x)
        return y, jax.tree.leaves(state)

    def flat_evaluate(params, state, x):
        return evaluate(of_params.unflatten(params), of_state.unflatten(state), x)

    return Functional(params, state, flat_train, flat_evaluate)


def pullback(layer: Functional, params: Arrays, state: Arrays, x: jax.Array):
    """The output, what takes its gradient to those of parameters and input, and the new state."""
    return jax.vjp(lambda params, x: layer.train(params, state, x), params, x, has_aux=True)


def training_step(layer: Functional):
    """Output, new state, and gradients of parameters and input for a gradient of the output."""

    def step(params, state, x, dy):
        y, backward, state = pullback(layer, params, state, x)
        return y, state, backward(dy.astype(y.dtype))

    return step


def evaluation_step(layer: Functional):
    """The output alone; the gradient is taken too, so that both steps are called alike."""

    def step(params, state, x, dy):
        del dy
        return layer.evaluate(params, state, x)

    return step


STEPS = {"training": training_step, "evaluation": evaluation_step}
