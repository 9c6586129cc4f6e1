"""What a method tells a framework: which variables it needs, and how one call goes.

A spec is a dataclass of static options that knows nothing of Flax. A shell (`jaxnorm.linen`,
`jaxnorm.nnx`) creates the variables a spec asks for, hands their values to `_transform`, and stores
what comes back. The fields of a spec stand in Flax's order, so that they can be given by position
where Flax's can; what Flax does not have is keyword-only.

Methods are underscored because `nnx.tabulate` wraps public ones.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxnorm.core.devices import Devices, axis_names, check_bound, devices, is_bound

Initializer = Callable[..., Any]
Values = Mapping[str, jax.Array]


COUNT = jnp.float32
"""The dtype of counts, of steps and batches.

Floats, since whole states are averaged (weight averages, target networks), and averages of integers
are floats: the state would change its dtype. Exact up to 2**24; there a count stays.
"""


class Slot(NamedTuple):
    """One variable: its collection, shape, dtype, and initializer of (key, shape, dtype)."""

    collection: Literal["params", "batch_stats"]
    shape: tuple[int, ...]
    dtype: Any
    init: Initializer


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Spec:
    """A method that maps an activation to one of the same shape, with or without statistics.

    Its fields `axis_name` and `axis_index_groups` name the mapped axes it pools over.

    Args:
        unbound_axis: what to do in training where an axis of `axis_name` is not mapped: `"error"`
            raises NameError, `"local"` pools over the others, or over none, where there are no
            `axis_index_groups` either. Initializing never pools, whatever is mapped.
    """

    unbound_axis: Literal["error", "local"] = "error"

    _axis_option: ClassVar[str] = "axis"
    """The option that says where the features are, for messages."""

    def _check_options(self: Any, who: str) -> None:
        """Raises ValueError if options contradict each other."""
        if self.axis_index_groups is not None and self.axis_name is None:
            devices(None, self.axis_index_groups, who)
        if self.unbound_axis not in ("error", "local"):
            raise ValueError(
                f"{who}: unbound_axis={self.unbound_axis!r} is unknown. "
                f"Use unbound_axis='error' or unbound_axis='local'."
            )

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
            mask: which elements count, or how much; None for all.
            dtype: dtype of the result.
            who: the layer's name for errors.
            initializing: whether the variables were only now created. Statistics do not move then,
                and mapped axes need not exist.
            **mode: what else a call can say, such as `use_running_average`.

        Returns:
            The result, and the new values of the variables that changed.
        """

    def _mapped_axes(self: Any, initializing: bool, who: str) -> dict[str, Any]:
        """Over which mapped axes to pool: none while initializing, when none need exist.

        Raises:
            NameError: one of them is not bound, and must be.
            ValueError: groups are numbered along one that is not bound.
        """
        if initializing or self.axis_name is None:
            return dict(axis_name=None, axis_index_groups=None)
        names, groups = axis_names(self.axis_name), self.axis_index_groups
        if self.unbound_axis == "error":
            option = " To pool over what is mapped, or not at all: unbound_axis='local'."
            check_bound(names, who, option)
        bound = tuple(name for name in names if is_bound(name))
        if groups is not None and 0 < len(bound) < len(names):
            raise ValueError(
                f"{who}: axis_index_groups count the devices along all of axis_name={names}, of "
                f"which only {bound} are bound here. Map all of them or none, or use "
                f"axis_index_groups=None."
            )
        return dict(axis_name=bound or None, axis_index_groups=groups if bound else None)

    def _pooled_over(self, who: str) -> Devices | None:
        """The mapped axes over which a training call pools, or None for none."""
        return devices(**self._mapped_axes(False, who), who=who)
