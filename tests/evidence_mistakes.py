"""Models whose norms cannot tell their evidence. Part of the table of `test_errors.py`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from mistakes import Row
from tool_models import vector

from jaxnorm.tools.adapter.evidence import Collector
from jaxnorm.tools.adapter.models import model_of

X = vector()


class Norms(nn.Module):
    """Norms of which the input says how many there are."""

    @nn.compact
    def __call__(self, x):
        for i in range(1 + (x.shape[0] > 6)):
            x = nn.BatchNorm(use_running_average=True, name=f"norm{i}")(x)
        return x


class Computed(nn.Module):
    """A norm whose statistics are not what is stored."""

    computed: Callable[[jax.Array], jax.Array] = lambda leaf: leaf / 2

    @nn.compact
    def __call__(self, x):
        halved = nn.map_variables(
            nn.BatchNorm,
            "batch_stats",
            trans_in_fn=lambda stats: jax.tree.map(self.computed, stats),
            mutable=True,
        )
        return halved(use_running_average=True)(x)


class NormAndRelu(nn.BatchNorm):
    """A norm of a user's own."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x, use_running_average=True))


class Sliced(nn.Module):
    """One layer over two parts of the same statistics that overlap."""

    @nn.compact
    def __call__(self, x):
        stats = {
            name: self.variable("batch_stats", name, jnp.ones, 4).value for name in ("mean", "var")
        }
        norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        for i in range(2):
            part = {name: leaf[i : i + 3] for name, leaf in stats.items()}
            x = x.at[:, :3].set(norm.apply({"batch_stats": part}, x[:, :3]))
        return x


def collector(module, x=X):
    adapter = model_of(module.bind(module.init(jax.random.key(0), x)), "population_stats")
    return adapter, Collector(adapter, lambda model: model(x), "population_stats")


def another_batch():
    module, x = Norms(), jnp.concatenate([X, X])
    adapter = model_of(module.bind(module.init(jax.random.key(0), x)), "population_stats")
    taken = Collector(adapter, lambda model: model(X), "population_stats")
    taken.evidence(adapter.arrays, lambda model: model(x))


ROWS = [
    Row(
        "batches for which a model calls different norms",
        another_batch,
        ValueError,
        r"^population_stats: the first batch called the norms 'norm0', another 'norm0', 'norm1'\. "
        r"Give batches",
        with_values=True,
    ),
    Row(
        "a norm whose statistics are computed",
        lambda: collector(Computed()),
        ValueError,
        r"^population_stats, '.*BatchNorm_0': its statistics are computed.*its own variables",
        with_values=True,
    ),
    Row(
        "calls of a norm that share a part of its statistics",
        lambda: collector(Sliced()),
        ValueError,
        r"^population_stats: its calls share a part of their statistics.*Give each layer its own",
        with_values=True,
    ),
    Row(
        "a subclass of a norm with a call of its own",
        lambda: collector(NormAndRelu()),
        ValueError,
        r"^population_stats: is a NormAndRelu.*only=lambda path: path not in \[''\]\. Or write a "
        r"module.*in the place of a subclass",
        with_values=True,
    ),
    Row(
        "a norm whose statistics are cast on the way to it",
        lambda: collector(Computed(lambda leaf: leaf.astype(jnp.bfloat16))),
        TypeError,
        r"^population_stats, '.*BatchNorm_0': its statistics come to it as bfloat16.*as they are",
        with_values=True,
    ),
]
