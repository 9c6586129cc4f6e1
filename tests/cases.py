"""The inputs on which normalization over a batch is tried, in all its forms.

A law is a test, a case a row of this table: a new row joins all laws.
"""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One kind of input.

    Attributes:
        name: shown by pytest.
        shape: of the input.
        axis: its feature axes.
        mask: shape of the mask, or None.
        weights: whether the mask holds weights.
        scale, bias: whether there are these parameters.
    """

    name: str
    shape: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)
    mask: tuple[int, ...] | None = None
    weights: bool = False
    scale: bool = True
    bias: bool = True

    def arrays(self, seed: int = 0, dtype=np.float64):
        """x, scale, bias and mask as NumPy arrays; None where the case has none."""
        rng = np.random.default_rng(seed)

        def draw(shape):
            values = rng.normal(size=shape)
            if np.issubdtype(dtype, np.complexfloating):
                values = values + 1j * rng.normal(size=shape)
            return values.astype(dtype)

        features = tuple(self.shape[a] for a in sorted(a % len(self.shape) for a in self.axis))
        x = 1.5 * draw(self.shape) + 0.5
        scale = 1 + 0.3 * draw(features) if self.scale else None
        bias = draw(features) if self.bias else None
        mask = None if self.mask is None else rng.random(self.mask) < 0.7
        if self.weights:
            mask = mask * rng.uniform(0.2, 1.8, self.mask)
        return x, None if scale is None else scale.astype(dtype), bias, mask


CASES = (
    Case("dense", (7, 3)),
    Case("conv", (3, 2, 2, 3)),
    Case("first axis", (3, 6), axis=(0,)),
    Case("middle axis", (4, 3, 2), axis=(1,)),
    Case("two feature axes", (5, 2, 3), axis=(1, -1)),
    Case("no parameters", (7, 3), scale=False, bias=False),
    Case("only scale", (7, 3), bias=False),
    Case("only bias", (7, 3), scale=False),
    Case("masked rows", (8, 3), mask=(8, 1)),
    Case("masked elements", (8, 3), mask=(8, 3)),
    Case("weighted positions", (4, 3, 2), mask=(4, 3, 1), weights=True),
    Case("masked conv, no parameters", (4, 3, 2), mask=(4, 1, 1), scale=False, bias=False),
)
