"""Norms that users wrote themselves, and layers in loops: tools name them and treat the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from tool_models import jit_to_run_once, vector

import jaxnorm
from jaxnorm import tools
from jaxnorm.diagnose import report_norms
from jaxnorm.tools.adapter.lookalikes import lookalikes
from jaxnorm.tools.adapter.models import model_of

pytestmark = pytest.mark.usefixtures("quick_compile")

X = vector(3)


@pytest.fixture(autouse=True)
def _users_let_ranks_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


ONES, ZEROS = nn.initializers.ones, nn.initializers.zeros


class OwnBatchNorm(nn.Module):
    """A user's batch norm, with names of variables that he chose."""

    mean: str = "mean"
    var: str = "var"

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", self.mean, jnp.zeros, x.shape[-1]).value
        var = self.variable("batch_stats", self.var, jnp.ones, x.shape[-1]).value
        scale, bias = (self.param(n, i, x.shape[-1:]) for n, i in (("scale", ONES), ("b", ZEROS)))
        return scale * (x - mean) * lax.rsqrt(var + 1e-5) + bias


class FusedBatchNorm(nn.Module):
    """One that holds its dense layer as well."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", ONES, (x.shape[-1], 4))
        mean = self.variable("batch_stats", "mean", jnp.zeros, 4).value
        var = self.variable("batch_stats", "var", jnp.ones, 4).value
        return self.param("gamma", ONES, (4,)) * (x @ kernel - mean) / jnp.sqrt(var + 1e-5)


class OwnRMSNorm(nn.Module):
    name_of_scale: str = "scale"

    @nn.compact
    def __call__(self, x):
        scale = self.param(self.name_of_scale, ONES, x.shape[-1:])
        return scale * x * (jnp.mean(x**2, -1, keepdims=True) + 1e-6) ** -0.5


class Step(nn.Module):
    """One step of a scan over norms, whose stored variables have an axis besides."""

    @nn.compact
    def __call__(self, x, _):
        return OwnRMSNorm("weight", name="norm")(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.scan(Step, length=2, **stacked)(name="steps")(x, None)[0]


class ByThisLibrary(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxnorm.rms_norm(x, self.param("weight", ONES, x.shape[-1:]))


class LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("gamma", ONES, x.shape[-1:])


class OwnDense(nn.Module):
    """With a root in it, such as of an initializer by hand."""

    @nn.compact
    def __call__(self, x):
        scale, weight = self.param("scale", ONES, (4,)), self.param("weight", ONES, (4, 4))
        return scale * (x @ weight) / jnp.sqrt(jnp.sum(weight**2))


class Temperature(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x / jnp.sqrt(self.param("scale", ONES, ()))


class Around(nn.Module):
    """A layer with a scale of its own around others, one of which takes a root."""

    @nn.compact
    def __call__(self, x):
        return self.param("scale", ONES, (4,)) * nn.LayerNorm(name="inner")(x)


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.sqrt(self.param("embedding", ONES, (8, 4)))[0]


NORMS = {
    "batch": (OwnBatchNorm, {"scale", "b"}),
    "moving": (
        lambda **name: OwnBatchNorm("moving_mean", "moving_variance", **name),
        {"scale", "b"},
    ),
    "fused": (FusedBatchNorm, {"gamma"}),
    "rms": (OwnRMSNorm, {"scale"}),
    "weighted": (lambda **name: OwnRMSNorm("weight", **name), {"weight"}),
    "jitted": (nn.jit(OwnRMSNorm), {"scale"}),
    "checkpointed": (nn.remat(OwnRMSNorm), {"scale"}),
    "ours": (ByThisLibrary, {"weight"}),
}
OTHERS = {
    "layer_scale": LayerScale,
    "own_dense": OwnDense,
    "temperature": Temperature,
    "around": Around,
    "embedding": Embedding,
}


class Everything(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, (norm, _) in NORMS.items():
            x = norm(name=name)(x)
        for name, layer in OTHERS.items():
            x = layer(name=name)(x)
        return nn.BatchNorm(True, name="flax")(nn.Dense(4, name="dense")(x))


def bound(module):
    return module.bind(jit_to_run_once(module.init)(jax.random.key(0), X))


def test_what_counts_as_a_norm():
    model = bound(Everything())
    found = lookalikes(model_of(model, "test"), lambda model: model(X))
    assert {path: each.params for (path,), each in found.items()} == {
        name: params for name, (_, params) in NORMS.items()
    }
    assert {path for (path,), each in found.items() if each.has_statistics} == {
        "batch",
        "moving",
        "fused",
    }
    assert found["jitted",].kind == "OwnRMSNorm"
    decays = tools.decay_mask(model, X, biases=True)
    known = {"flax": {"scale", "bias"}, "around": {"inner"}}
    for layer, params in decays.items():
        norm = NORMS[layer][1] if layer in NORMS else known.get(layer, set())
        assert {name for name, decay in params.items() if decay is not True} == norm
    assert tools.decay_mask(model, X, only="batch")["rms"]["scale"]
    assert tools.norm_mask(model, X)["batch"] == {"scale": True, "b": True}


class NNXNorm(nnx.Module):
    def __init__(self, name, *, rooted=True):
        setattr(self, name, nnx.Param(jnp.ones(4)))
        self.name, self.rooted = name, rooted

    def __call__(self, x):
        y = getattr(self, self.name) * x
        return y * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) if self.rooted else y


class NNXBatchNorm(NNXNorm):
    def __init__(self, name):
        super().__init__(name)
        self.mean, self.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))


class WithHead(NNXNorm):
    """One whose input is not known without a call of the model."""

    def __call__(self, x, head):
        return head(super().__call__(x))


def test_what_counts_as_a_norm_in_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        rms=NNXNorm("scale"),
        batch=NNXBatchNorm("g"),
        with_head=WithHead("scale"),
        layer_scale=NNXNorm("gamma", rooted=False),
        other=NNXNorm("alpha"),
        dense=nnx.Linear(4, 4, rngs=rngs),
    )
    mask = tools.norm_mask(model)
    norms = {"rms", "batch", "with_head"}
    assert {name for name, params in mask.items() if any(params.values())} == norms


class Looped(nn.Module):
    """A layer in a loop, of which it is not known how often it runs, and known layers around."""

    inside: type[nn.Module] = nn.Dense
    options: tuple = (4,)
    own: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        layer = self.inside(*self.options, name="inside")
        x = nn.BatchNorm(True, name="norm")(nn.Dense(4, name="dense")(x))
        x = self.own(**({"features": 4} if self.own is nn.Dense else {}), name="own")(x)
        if self.is_initializing():
            return layer(x)

        def step(_, carry):
            return carry[0] + 1, layer(carry[1])

        return nn.while_loop(lambda _, carry: carry[0] < 2, step, self, (0, x))[1]


IN_LOOP = "lies inside 'while', out of which nothing can be read"
OWN = "OwnBatchNorm is a norm by its variables"


def test_a_norm_in_a_scan():
    model = bound(Scanned())
    assert tools.norm_mask(model, X) == {"steps": {"norm": {"weight": True}}}


def looped():
    """A model with a batch norm in a loop, one of the user's, and one of Flax's outside."""
    return bound(Looped(nn.BatchNorm, (True,), OwnBatchNorm))


def test_masks_and_exchanged_layers_reach_into_loops():
    """What needs no value is done there as well: a norm is exchanged where it is called."""
    model = looped()
    mask = tools.decay_mask(model, X)
    assert [name for name, params in mask.items() if any(params.values())] == ["dense"]
    frozen = tools.freeze(model, X)
    assert set(frozen.frozen) == {"inside", "norm"}
    assert frozen.left["own"].startswith(OWN)
    replaced = tools.replace(model, tools.to("RMSNorm"), X)
    assert {each.path for each in replaced.changed} == {"inside", "norm"}
    assert set(replaced.refused) == {"own"}
    expected = X @ model.variables["params"]["dense"]["kernel"]
    for _ in range(3):
        expected = jaxnorm.rms_norm(expected, epsilon=1e-5)
    np.testing.assert_allclose(replaced.model(X), expected, rtol=1e-5, atol=1e-5)


def test_what_reads_values_names_what_it_leaves():
    model = looped()
    left = tools.fold(model, X).left
    assert left["own"].startswith(OWN)
    assert set(left) == {"own", "inside"}
    seen = report_norms(model, X, singular_values=False)
    assert [row.path for row in seen.rows] == ["norm"]
    assert seen.unseen["inside"].startswith(IN_LOOP)
    assert seen.unseen["own"].startswith(OWN)
    assert f"not looked at: inside: {IN_LOOP}" in str(seen).replace("\n", " ")
    with pytest.warns(UserWarning, match=rf"'inside' {IN_LOOP}.*'own' {OWN}.*only=lambda path"):
        exact = tools.population_stats(model, [X]).variables["batch_stats"]
    before = model.variables["batch_stats"]
    assert (exact["norm"]["mean"] != before["norm"]["mean"]).all()
    for name in ("inside", "own"):
        jax.tree.map(np.testing.assert_array_equal, exact[name], before[name])
    tools.adapt_stats(model, [X], only="norm")  # without a warning
    tent = tools.tent(bound(Looped(own=OwnBatchNorm)), optax.sgd(0.1), X)
    assert tent.left["own"].startswith(OWN)
