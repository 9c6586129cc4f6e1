"""What a method tells a framework: which variables it needs, and how one call goes.

A spec is a dataclass of static options that knows nothing of Flax. A shell (`jaxnorm.linen`,
`jaxnorm.nnx`) creates the variables a spec asks for, hands their values to `_transform`, and stores
what comes back. The fields of a spec stand in Flax's order, so that they can be given by position
where Flax's can; what Flax does not have is keyword-only.

Methods are underscored because `nnx.tabulate` wraps public ones.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from jaxnorm.core.devices import devices

Initializer = Callable[..., Any]
Values = Mapping[str, jax.Array]


class Slot(NamedTuple):
    """One variable: its collection, shape, dtype, and initializer of (key, shape, dtype)."""

    collection: Literal["params", "batch_stats"]
    shape: tuple[int, ...]
    dtype: Any
    init: Initializer


class Spec:
    """A method that maps an activation to one of the same shape, with or without statistics.

    Its options `axis_name` and `axis_index_groups` name the mapped axes it pools over.
    """

    _axis_option: ClassVar[str] = "axis"
    """The option that says where the features are, for messages."""

    def _check_options(self: Any, who: str) -> None:
        """Raises ValueError if options contradict each other."""
        if self.axis_index_groups is not None and self.axis_name is None:
            devices(None, self.axis_index_groups, who)

    @abc.abstractmethod
    def _feature_axes(self, ndim: int, who: str) -> tuple[int, ...]:
        """The canonical feature axes of an input with `ndim` axes."""

    @abc.abstractmethod
    def _slots(self, features: tuple[int, ...], is_complex: bool, who: str) -> dict[str, Slot]:
        """The variables by name, for these sizes along the feature axes and this kind of input.

        In the order in which Flax draws random keys for them.
        """

    @abc.abstractmethod
    def _transform(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One call, `(values, x, mask, dtype, who, *, initializing, **mode)`.

        Args:
            values: the variables of `_slots`, by name.
            x: the input.
            mask: which elements count, or None.
            dtype: dtype of the result.
            who: the layer's name for errors.
            initializing: whether the variables were only now created. Statistics do not move then,
                and mapped axes need not exist.
            **mode: what else a call can say, such as `use_running_average`.

        Returns:
            The result, and the new values of the variables that changed.
        """

    def _mapped_axes(self: Any, initializing: bool) -> dict[str, Any]:
        """Over which mapped axes to pool: none while initializing, when none need exist."""
        if initializing:
            return {}
        return dict(axis_name=self.axis_name, axis_index_groups=self.axis_index_groups)
