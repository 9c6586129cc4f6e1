"""The Linen shell: turns the slots of a spec into Linen variables."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm.core import checks, precision
from jaxnorm.core.axes import sizes
from jaxnorm.methods.accumulation import PREFIX
from jaxnorm.methods.spec import Slot


class StatsNotMutableError(errors.ModifyScopeVariableError):
    """Training moves running statistics, but the collection that holds them is not mutable."""

    def __init__(self, who: str, collection: str):
        # Past FlaxError, which would append the address of a page of Flax's own documentation.
        Exception.__init__(
            self,
            f"{who}: training moves the running statistics in '{collection}', which is not mutable "
            f"here. Pass mutable=['{collection}'] to apply and keep what it returns: "
            f"y, updated = model.apply(variables, x, mutable=['{collection}']). To train without "
            f"moving them, call the layer with update_stats=False.",
        )


class _CalledAsOne:
    """Keeps Flax from wrapping the methods of this library, but for `__call__`.

    Flax wraps each method that a class of modules defines, private ones too. Method interceptors,
    `capture_intermediates` and `tabulate(show_repeated=True)` would then see every helper as a call
    of the layer. What users define in subclasses of their own is left to Flax.
    """

    def __init_subclass__(cls, **kwargs: Any):
        if cls.__module__.startswith("jaxnorm.linen."):
            for name, member in vars(cls).items():
                if inspect.isfunction(member) and name != "__call__":
                    nn.nowrap(member)
        super().__init_subclass__(**kwargs)


class Shell(_CalledAsOne, nn.Module):
    """What all Linen modules of this library share."""

    @property
    def _who(self: Any) -> str:
        path = "/".join(self.path)
        return f"{type(self).__name__} '{path}'" if path else type(self).__name__

    def _normalize(self: Any, x: ArrayLike, mask: ArrayLike | None, **mode: Any) -> jax.Array:
        """One call: declares the variables, normalizes, stores what changed."""
        who = self._who
        self._check_options(who)
        initializing = self.is_initializing()
        given = checks.any_array(x, who)
        x = checks.input_array(given, who)
        axes = self._feature_axes(x.ndim, who)
        slots = self._slots(sizes(x.shape, axes), precision.is_complex(x.dtype), who)
        if not initializing and "updates" in slots:
            # A checkpoint of Flax has no count of updates: inference does without.
            if mode["update_stats"]:
                self._check_updates(slots["updates"])
            else:
                del slots["updates"]
        found = f"the input of shape {x.shape} has {checks.describe_features(x.shape, axes)}"
        absent = {} if initializing else self._absent_pending(slots)
        there = {name: slot for name, slot in slots.items() if name not in absent}
        values = self._declare(there, found) | absent
        dtype = self.dtype
        if dtype is None:
            params = (values[name].dtype for name in ("scale", "bias") if name in values)
            dtype = precision.promote_inexact(given.dtype, *params)
        y, changed = self._transform(values, x, mask, dtype, who, initializing=initializing, **mode)
        for name, value in changed.items():
            self.put_variable("batch_stats", name, value)
        return y

    def _absent_pending(self: Any, slots: dict[str, Slot]) -> dict[str, jax.Array]:
        """What stands for pending evidence that a checkpoint lacks: none.

        Unlike a count of updates it may start at 0 at any time: nothing stored depends on it.
        """
        return {
            name: slot.init(None, slot.shape, slot.dtype)
            for name, slot in slots.items()
            if name.startswith(PREFIX) and not self.has_variable(slot.collection, name)
        }

    def _declare(self: Any, slots: dict[str, Slot], found_in_input: str) -> dict[str, Any]:
        """Creates or finds the variables of `slots`; returns their values by name."""
        values = {}
        for name, (collection, shape, dtype, init) in slots.items():
            if self.has_variable(collection, name):
                # Not by `param`, which traces the initializer at each call, for the shape alone.
                values[name] = self._found(collection, name, shape, found_in_input)
            elif collection == "params":
                values[name] = self.param(name, init, shape, dtype)
            else:
                values[name] = self.variable(collection, name, init, None, shape, dtype).value
        return values

    def _found(
        self: Any, collection: str, name: str, shape: tuple[int, ...], found_in_input: str
    ) -> Any:
        value = nn.unbox(self.get_variable(collection, name))
        if jnp.shape(value) != shape:
            raise ValueError(
                f"{self._who}: '{name}' in '{collection}' was created with shape "
                f"{jnp.shape(value)}, but {found_in_input}, which needs shape {shape}. Give the "
                f"layer the kind of input it was initialized with, or initialize it anew; where "
                f"the features are is set by {self._axis_option}=..."
            )
        return value

    def _check_updates(self: Any, slot: Slot) -> None:
        """Without a count the statistics would pass for their starting values, and be dropped."""
        if not self.has_variable(slot.collection, "updates"):
            raise ValueError(
                f"{self._who}: momentum={self.momentum}, debias={self.debias} weigh a batch by how "
                f"many came before, but '{slot.collection}' has no 'updates', as in a checkpoint "
                f"of Flax. Add it: jnp.full({slot.shape}, n, jnp.float32), with n the number of "
                f"training steps so far, or 0 to start the statistics anew."
            )


class StatelessShell(Shell):
    """Linen modules that know nothing but their parameters."""

    @nn.compact
    def __call__(self: Any, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(x, mask)


class ModalShell(Shell):
    """Linen modules that are in training or in inference, as the constructor or the call says."""

    def _chosen(
        self: Any, use_running_average: bool | None, update_stats: bool | None
    ) -> dict[str, bool]:
        """Whether this call uses the running statistics, and whether it moves them."""
        who = self._who
        if self.use_running_average is not None and use_running_average is not None:
            raise ValueError(
                f"{who}: use_running_average={self.use_running_average} was given to the "
                f"constructor, and use_running_average={use_running_average} to the call. Give it "
                f"once, at the call if it changes between training and inference."
            )
        frozen, moves = self._mode(use_running_average, update_stats, who)
        if moves and not self.is_initializing() and not self.is_mutable_collection("batch_stats"):
            raise StatsNotMutableError(who, "batch_stats")
        return dict(use_running_average=frozen, update_stats=moves)


class RunningStatsShell(ModalShell):
    """Linen modules with running statistics in the mutable collection `batch_stats`."""

    @nn.compact
    def __call__(
        self: Any,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: input of any shape; float, bfloat16 or complex; integers become float32.
            use_running_average: True for inference, False for training; here or in the constructor,
                not both.
            mask: which elements count, by booleans or weights, or None for all; of the shape of
                `x`, or of size 1 along some axes. See `jaxnorm.normalize`.
            update_stats: whether training moves the running statistics; None for the constructor's
                choice. False needs no mutable collection.

        Returns:
            Array of the shape of `x`.
        """
        return self._normalize(x, mask, **self._chosen(use_running_average, update_stats))
