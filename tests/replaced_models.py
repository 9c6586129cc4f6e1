"""Models and layers that `replace` meets: told of a mask, a user's own, stacked another way."""

from flax import linen as nn
from flax import nnx


class Masked(nn.Module):
    """A norm that is told of training and of a mask at its call."""

    norm: nn.Module

    def __call__(self, x, mask):
        return self.norm(x, use_running_average=False, mask=mask)


class NNXMasked(nnx.Module):
    """The twin of `Masked`."""

    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x, mask):
        return self.norm(x, use_running_average=False, mask=mask)


class Activated(nn.BatchNorm):
    """A user's batch norm that does more."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        return nn.relu(super().__call__(x, use_running_average))


class NNXActivated(nnx.BatchNorm):
    """The twin of `Activated`."""

    def __call__(self, x):
        return nnx.relu(super().__call__(x))


class OwnDefaults(nn.BatchNorm):
    """A user's batch norm that is one."""

    epsilon: float = 0.1


class NNXOwnDefaults(nnx.BatchNorm):
    """The twin of `OwnDefaults`."""

    def __init__(self, features, rngs):
        super().__init__(features, epsilon=0.1, rngs=rngs)


class Step(nn.Module):
    """One of layers that are stacked along their last axis."""

    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class StackedLast(nn.Module):
    """Layers stacked along the last axis."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 1, "batch_stats": 1}
        layers = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class NNXStackedLast(nnx.Module):
    """The twin of `StackedLast`."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=1)
        def stacked(rngs):
            return NNXStep(rngs)

        self.layers = stacked(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(1, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


class NNXStep(nnx.Module):
    """The twin of `Step`."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)
