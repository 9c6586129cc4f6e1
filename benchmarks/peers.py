"""The layers that are compared: a table of libraries, and how each makes its layers.

A new peer joins by one entry in `PEERS`. Its function makes a layer of a method for an input; the
layer is two pure functions of parameters, state and input, whatever the library calls them. The
same epsilon, momentum and groups are asked of all. PyTorch has its own process (`torch_worker.py`).
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.cases import FOR_IMAGES
from benchmarks.flax_layers import linen_layer, nnx_layer
from benchmarks.functional import Functional
from benchmarks.other_layers import equinox_layer, haiku_layer, keras_layer


class Peer(NamedTuple):
    """A library with one kind of layers.

    Attributes:
        name: in the tables.
        package: that must be installed.
        layer: makes the layer of a method for an input.
        features_first: whether it wants the features of images next to the batch.
    """

    name: str
    package: str
    layer: Callable[[str, jax.Array], Functional]
    features_first: bool = False

    def arranged(self, method: str, x: Any) -> Any:
        """An array with the features last, in this library's order of axes."""
        return jnp.moveaxis(x, -1, 1) if self._moves(method) else x

    def restored(self, method: str, x: Any) -> Any:
        """The inverse of `arranged`."""
        return jnp.moveaxis(x, 1, -1) if self._moves(method) else x

    def _moves(self, method: str) -> bool:
        return self.features_first and method in FOR_IMAGES


OURS, OURS_NNX, FLAX, FLAX_NNX = "jaxnorm", "jaxnorm NNX", "Flax", "Flax NNX"
TORCH = "PyTorch"

PEERS = (
    Peer(OURS, "jaxnorm", partial(linen_layer, "jaxnorm.linen")),
    Peer(OURS_NNX, "jaxnorm", partial(nnx_layer, "jaxnorm.nnx")),
    Peer(FLAX, "flax", partial(linen_layer, "flax.linen")),
    Peer(FLAX_NNX, "flax", partial(nnx_layer, "flax.nnx")),
    Peer("Haiku", "haiku", haiku_layer),
    Peer("Equinox", "equinox", equinox_layer, features_first=True),
    Peer("Keras", "keras", keras_layer),
)
NAMES = (*(peer.name for peer in PEERS), TORCH)


def is_installed(package: str) -> bool:
    """Whether a package is there, without loading it."""
    return importlib.util.find_spec(package) is not None


def found(names: tuple[str, ...]) -> list[Peer]:
    """The chosen peers that are installed, in the order of the table."""
    return [peer for peer in PEERS if peer.name in names and is_installed(peer.package)]
