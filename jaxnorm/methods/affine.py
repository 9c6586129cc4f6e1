"""The learned scale and bias that most methods end with, as part of a spec.

y * scale + bias,   or   y * (1 + scale) + bias   with a zero-centred scale
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.core import precision
from jaxnorm.methods.spec import Slot, Spec, Values


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Affine(Spec):
    """Part of specs with the fields `use_scale`, `use_bias`, their initializers, `param_dtype`.

    Args:
        zero_centered_scale: store the scale minus 1, so that weight decay pulls it to 1, and so
            that it keeps its digits in bfloat16.
    """

    zero_centered_scale: bool = False

    def _affine_slots(self: Any, features: tuple[int, ...]) -> dict[str, Slot]:
        slots = {}
        if self.use_scale:
            init = self.scale_init
            if self.zero_centered_scale and init is jax.nn.initializers.ones:
                init = jax.nn.initializers.zeros
            slots["scale"] = Slot("params", features, self.param_dtype, init)
        if self.use_bias:
            slots["bias"] = Slot("params", features, self.param_dtype, self.bias_init)
        return slots

    def _affine(
        self, values: Values, x: jax.Array | None = None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """The factor and the summand that `values` stand for, of the input `x`."""
        scale, bias = values.get("scale"), values.get("bias")
        if scale is not None and self.zero_centered_scale:
            # Added in what computes: 1 + scale in less would round off what was to be kept.
            wide = precision.accumulation_dtype(scale.dtype)
            wide = wide if x is None else precision.promote(wide, precision.real_dtype(x.dtype))
            scale = scale.astype(wide) + jnp.ones((), wide)
        return scale, bias
