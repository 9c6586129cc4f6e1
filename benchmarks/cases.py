"""What is measured: which norms, at which sizes of real models, in which dtypes.

This file and `oracle.py` load no JAX, since PyTorch's own process reads them too.
"""

from typing import NamedTuple

EPSILON, MOMENTUM, GROUPS = 1e-5, 0.9, 32

SIZES = {
    "transformer": (8, 512, 768),
    "wide-transformer": (16, 512, 1024),
    "resnet-56": (32, 56, 56, 64),
    "resnet-28": (32, 28, 28, 128),
    "resnet-14": (32, 14, 14, 256),
    "small": (128, 256),
}
TOKENS, IMAGES = ("transformer", "wide-transformer"), ("resnet-56", "resnet-28", "resnet-14")

METHODS = {
    "BatchNorm": (*IMAGES, "small"),
    "LayerNorm": (*TOKENS, "small"),
    "RMSNorm": (*TOKENS, "small"),
    "GroupNorm": (*IMAGES, "small"),
    "InstanceNorm": IMAGES,
}
# Methods that no peer has, and options without which they cannot be made.
FURTHER = {
    "BatchRenorm": {},
    "AdaBN": {"domains": ("photos", "sketches")},
    "SwitchableNorm": {},
    "IBNa": {},
    "IterNorm": {},
    "DecorrelatedBatchNorm": {},
}
FURTHER_SIZE = "resnet-28"
# Which keep running statistics, and so behave otherwise when they are evaluated.
RUNNING = ("BatchNorm", *FURTHER)
# Some peers want the features of images next to the batch: given so, nothing is moved for them.
FOR_IMAGES = ("BatchNorm", "GroupNorm", "InstanceNorm")

DTYPES = ("float32", "bfloat16")
STEPS = ("training", "evaluation")


class Case(NamedTuple):
    """One layer with one input."""

    method: str
    size: str
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, with the features last."""
        return SIZES[self.size]

    @property
    def label(self) -> str:
        """Method, shape and dtype in words."""
        return f"{self.method} {'x'.join(map(str, self.shape))} {self.dtype}"


def cases(methods: tuple[str, ...], sizes: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Case]:
    """Every chosen method at those of its sizes that were chosen, dtype by dtype."""
    return [
        Case(method, size, dtype)
        for dtype in dtypes
        for method in methods
        for size in METHODS[method]
        if size in sizes
    ]
