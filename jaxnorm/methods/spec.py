"""What a method tells a framework: which variables it needs, and how one call goes.

A spec is a dataclass of static options that knows nothing of Flax. A shell (`jaxnorm.linen`,
`jaxnorm.nnx`) creates the variables a spec asks for, hands their values to `transform`, and stores
what comes back. The fields of a spec stand in Flax's order, so that they can be given by position
where Flax's can; what Flax does not have is keyword-only.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jax.typing import ArrayLike

Initializer = Callable[..., Any]
Values = Mapping[str, jax.Array]


class Slot(NamedTuple):
    """One variable: its collection, shape, dtype, and initializer of (key, shape, dtype)."""

    collection: Literal["params", "batch_stats"]
    shape: tuple[int, ...]
    dtype: Any
    init: Initializer


class Spec(Protocol):
    """A method that maps an activation to one of the same shape, with or without statistics."""

    def _check_options(self, who: str) -> None:
        """Raises ValueError if options contradict each other."""
        ...

    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        """The canonical feature axes of an input with `ndim` axes."""
        ...

    def _slots(self, features: tuple[int, ...], is_complex: bool) -> dict[str, Slot]:
        """The variables by name, for these sizes along the feature axes and this kind of input.

        In the order in which Flax draws random keys for them.
        """
        ...

    def _transform(
        self,
        values: Values,
        x: jax.Array,
        mask: ArrayLike | None,
        dtype: Any,
        who: str,
        **mode: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One call: the result as `dtype`, and the new values of the variables that changed."""
        ...
