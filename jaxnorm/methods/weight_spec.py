"""What a method that normalizes weights tells a framework.

Such a method maps each weight of a layer to another of the same shape, with which the layer is
called; what is stored and trained is the first. A shell (`jaxnorm.linen`, `jaxnorm.nnx`) finds the
weights, creates the variables that the method asks for beside each, and calls the layer. The
fields of a spec stand in Flax's order, as in `jaxnorm.methods.spec`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxnorm.core import axes as ax
from jaxnorm.methods.spec import Slot, Values


class WeightSpec:
    """A method that maps a weight to one of the same shape, with or without statistics."""

    def _check_options(self, who: str) -> None:
        """Raises if options contradict each other."""

    def _leaves_whole(self, shape: tuple[int, ...], who: str) -> bool:
        """Whether a weight of this shape is used as it is stored."""
        return False

    def _slots(self, w: jax.Array, who: str) -> dict[str, Slot]:
        """The variables beside the stored weight `w`, by name; their initializers may use it."""
        return {}

    @abc.abstractmethod
    def _transform(
        self, values: Values, w: jax.Array, who: str, *, update_stats: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weight with which the layer is called.

        Args:
            values: the variables of `_slots`, by name.
            w: the stored weight.
            who: the layer's and the weight's names for errors.
            update_stats: whether statistics move; only for methods that have some.

        Returns:
            The weight, and the new values of the variables that changed.
        """


def first_value(slot: Slot, next_key: Callable[[], Any]) -> Any:
    """What a variable starts with. As in Flax, ones take no key from those that others draw."""
    key = None if slot.init is jax.nn.initializers.ones else next_key()
    return slot.init(key, slot.shape, slot.dtype)


def output_axes(axes: int | Sequence[int] | None, ndim: int, who: str) -> tuple[int, ...]:
    """Canonical axes of a weight along which its outputs lie; None for no axis."""
    return ax.canonical_axes(() if axes is None else axes, ndim, who)
