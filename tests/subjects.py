"""The methods as layers: what every law of `test_laws.py` and of the lifts is tried on.

A row is a method with some options. A new method joins all laws by one row, and the registry test
fails as long as there is none. Weight methods wrap layers and have laws of their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import batch_family_oracles as family
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import whitening_oracles as whitening
from modules import FRAMEWORKS, Layer, draw, draw_mask, draw_weights

import jaxnorm


class Subject(NamedTuple):
    """A method with some options.

    Attributes:
        name: shown by pytest.
        method: the name of its class in both frameworks.
        shape: of the input.
        mask: shape of the mask.
        oracle: (x, params, mask, **options) -> what the first training step returns, in float64.
        options: of the constructor.
        split: the axis of the input that is spread over devices, one that is pooled over.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    mask: tuple[int, ...]
    oracle: Callable[..., np.ndarray]
    options: dict[str, Any] = {}  # noqa: RUF012 (a row)
    split: int = 0

    def cls(self, framework: str) -> type:
        return getattr(getattr(jaxnorm, framework), self.method)

    def layer(self, framework: str, x: jax.Array, **options: Any) -> Layer:
        return FRAMEWORKS[framework](x, self.cls(framework), **self.options | options)

    def input(self, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
        return draw(self.shape, dtype, seed)

    def some_mask(self, seed: int = 0) -> jax.Array:
        return draw_mask(self.mask, seed)

    def some_weights(self, seed: int = 0) -> jax.Array:
        return draw_weights(self.mask, seed)


def drawn(params: dict[str, jax.Array], seed: int = 3) -> dict[str, jax.Array]:
    """Parameters near their first values, no two alike."""
    rng = np.random.default_rng(seed)
    return {
        name: value + jnp.asarray(0.3 * rng.normal(size=value.shape), value.dtype)
        for name, value in sorted(params.items())
    }


IMAGES, WIDE_IMAGES, TOKENS = (4, 4, 2, 8), (4, 4, 4, 8), (4, 3, 8)

SUBJECTS = (
    Subject("BatchNorm", "BatchNorm", IMAGES, (4, 4, 2, 8), oracles.of_batch_norm),
    Subject("LayerNorm", "LayerNorm", TOKENS, (4, 3, 1), oracles.of_layer_norm, split=-1),
    Subject(
        "LayerNorm of several axes",
        "LayerNorm",
        IMAGES,
        (4, 4, 2, 8),
        oracles.of_layer_norm,
        {"reduction_axes": (1, -1), "feature_axes": (2, -1)},
        split=1,
    ),
    Subject("RMSNorm", "RMSNorm", TOKENS, (4, 3, 8), oracles.of_rms_norm, split=-1),
    Subject(
        "RMSNorm with zero-centred scale",
        "RMSNorm",
        TOKENS,
        (4, 1, 1),
        oracles.of_rms_norm,
        {"zero_centered_scale": True},
        split=-1,
    ),
    Subject(
        "GroupNorm", "GroupNorm", IMAGES, (4, 4, 2, 1), oracles.of_group_norm, {"num_groups": 2}, 1
    ),
    Subject(
        "GroupNorm of some axes",
        "GroupNorm",
        IMAGES,
        (4, 4, 2, 8),
        oracles.of_group_norm,
        {"num_groups": None, "group_size": 2, "reduction_axes": (2, 3)},
        split=2,
    ),
    Subject(
        "InstanceNorm", "InstanceNorm", IMAGES, (4, 4, 2, 8), oracles.of_instance_norm, split=1
    ),
    Subject(
        "InstanceNorm with running statistics",
        "InstanceNorm",
        IMAGES,
        (4, 4, 2, 1),
        oracles.of_instance_norm,
        {"track_running_stats": True},
        split=1,
    ),
    Subject("BatchRenorm", "BatchRenorm", IMAGES, (4, 4, 2, 8), family.of_batch_renorm),
    Subject(
        "BatchRenorm at its limits",
        "BatchRenorm",
        TOKENS,
        (4, 3, 1),
        family.of_batch_renorm,
        {"rmax": 1.2, "dmax": 0.1},
    ),
    Subject("AdaBN", "AdaBN", IMAGES, (4, 4, 2, 1), family.of_adabn, {"domains": ("a", "b")}),
    Subject(
        "DecorrelatedBatchNorm",
        "DecorrelatedBatchNorm",
        WIDE_IMAGES,
        (4, 4, 4, 1),
        whitening.of_decorrelated_batch_norm,
        {"num_groups": None, "group_size": 4},
    ),
    Subject(
        "IterNorm",
        "IterNorm",
        WIDE_IMAGES,
        (4, 4, 4, 1),
        whitening.of_iter_norm,
        {"num_groups": None, "group_size": 4},
    ),
    Subject("SwitchableNorm", "SwitchableNorm", IMAGES, (4, 4, 2, 8), family.of_switchable_norm),
    Subject("IBNa", "IBNa", IMAGES, (4, 4, 2, 1), family.of_ibn_a),
    Subject("IBNb", "IBNb", IMAGES, (4, 4, 2, 8), family.of_ibn_b, split=1),
)

ACCUMULATING = tuple(
    subject._replace(
        name=f"{subject.name}, a step every 3 batches",
        options=subject.options | {"update_every": 3},
    )
    for subject in SUBJECTS
    if hasattr(subject.cls("linen"), "update_every") and subject.name != "InstanceNorm"
)


def in_turn(firsts, others, always=()):
    """All pairs as parameters, of which the default run takes one of the others for each, in turn.

    So each of either kind is there without their product; a run with -m slow takes the rest. What
    is `always` taken is so for each of the first.
    """
    turns = [other for other in others if other not in always]

    def pair(i, first, other):
        taken = other in always or other == turns[i % len(turns)]
        name = f"{getattr(first, 'name', first)}-{other}"
        return pytest.param(first, other, id=name, marks=() if taken else pytest.mark.slow)

    return [pair(i, first, other) for i, first in enumerate(firsts) for other in others]


EACH = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
# Where options make no difference: one row of each method, the others among the slow ones.
FIRSTS = {subject.method: subject.name for subject in reversed(SUBJECTS)}.values()
EACH_METHOD = pytest.mark.parametrize(
    "subject",
    [
        pytest.param(subject, marks=() if subject.name in FIRSTS else pytest.mark.slow)
        for subject in SUBJECTS
    ],
    ids=lambda subject: subject.name,
)
BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)
