"""Mistakes with statistics of data sets: the population's, adapted ones, and TENT."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm.tools import adapt_stats, batch_adapter, freeze, population_stats, tent
from jaxnorm.tools.adapter.evidence import Collector
from jaxnorm.tools.adapter.models import model_of
from mistakes import refused, type_error, value_error, while_tracing, with_values

X = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)
SGD = optax.sgd(0.1)


def batch_norm():
    return nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def population(batches=(X,), model=None, **options):
    return population_stats(model or batch_norm(), batches, **options)


def adapted(batches=(X,), **options):
    return adapt_stats(batch_norm(), batches, **options)


@with_values
def test_batches():
    for batches in (X, {"x": X}, 3):
        kind = type(batches).__name__
        with type_error(f"population_stats: the batches are {kind} … iterable … [batch]"):
            population(batches)
    with type_error("population_stats: a batch holds str … batches=map(convert, batches)"):
        population(["a"], call=lambda model, batch: model(X))
    with value_error("adapt_stats: in pass 1 there are no batches … Give one or more"):
        adapted([])
    with value_error("population_stats: NaN or infinite statistics in '' … batches … weights"):
        population([np.full((2, 2), np.nan, np.float32)])
    # Examples of two numbers, and of none.
    for batch in ((X, X[:1]), np.float32(0)):
        with value_error("adapt_stats: … arrays … have the shapes … examples=lambda batch: len("):
            adapted([batch], prior_strength=1, call=lambda model, batch: model(X))

    # Several passes.
    with type_error("population_stats: … list_iterator … once … batches=lambda: load()"):
        population(iter([X]), order="layer by layer")
    the_same = iter([X, X])
    with value_error("population_stats: in pass 2 there are no batches … new iterable"):
        population(lambda: the_same, order="layer by layer")
    with value_error("population_stats: after 12 passes … '' still move … order='together'"):
        population(call=lambda norm, x: norm(100 * norm(x)), order="layer by layer")


@with_values
def test_calls_and_options():
    for tool, batch, shown, fix in (
        (population_stats, [(X, np.arange(2))], "(float32[2, 2], int64[2])", "model(batch[0])"),
        (adapt_stats, [{"image": X}], "{image: float32[2, 2]}", "model(batch['image'])"),
        (batch_adapter, np.ones((3, 5), "f"), "float32[3, 5]", "model(batch, train=False)"),
    ):
        says = f"{tool.__name__}: model({shown}) raised … . Say how … lambda model, batch: {fix}"
        with refused((TypeError, ValueError), says):
            tool(batch_norm(), batch)
    with type_error("batch_adapter: the call returns str … call= … model(batch)['log"):
        batch_adapter(batch_norm(), X, call=lambda model, x: (model(x), "logits"))(X)
    with value_error("population_stats: the call reaches no norm with stored statistics … call="):
        population(model=nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
    with value_error("population_stats: … nothing valid reached '' … only=lambda path: path not"):
        population(
            model=jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
            call=lambda model, x: model(x, mask=np.zeros((2, 1), bool)),
        )

    with value_error("population_stats: order='sequential' is unknown … order='layer by layer'"):
        population(order="sequential")
    with value_error("population_stats: running_var='sample' … running_var='unbiased', or None"):
        population(running_var="sample")
    for strength in ("1", None, -1, np.nan):
        error = ValueError if isinstance(strength, int | float) else TypeError
        says = f"adapt_stats: prior_strength={strength!r} must be a number from 0 … strength=0"
        with refused(error, says):
            adapted(prior_strength=strength)


@while_tracing
def test_traced_batches():
    with type_error("population_stats: works on values … cannot be traced … outside of jax.jit"):
        population([jnp.zeros((3, 2))])


class Norms(nn.Module):
    """Norms of which the input says how many there are."""

    @nn.compact
    def __call__(self, x):
        for i in range(1 + (x.shape[0] > 2)):
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
        names = ("mean", "var")
        stats = {name: self.variable("batch_stats", name, jnp.ones, 3).value for name in names}
        norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        for i in range(2):
            part = {name: leaf[i : i + 2] for name, leaf in stats.items()}
            x = x.at[:, :2].set(norm.apply({"batch_stats": part}, x[:, :2]))
        return x


def collector(module, x=X, variables_for=None):
    variables = jax.jit(module.init)(
        jax.random.key(0), x if variables_for is None else variables_for
    )
    model = model_of(module.bind(variables), "population_stats")
    return Collector(model, lambda model: model(x), "population_stats"), model


@with_values
def test_norms_that_cannot_tell_their_evidence():
    more = np.concatenate([X, X])
    with value_error(
        "population_stats: the first … 'norm0', another 'norm0', 'norm1'. Give batches"
    ):
        taken, model = collector(Norms(), X, variables_for=more)
        taken.evidence(model.arrays, lambda model: model(more))
    with value_error("population_stats, '…BatchNorm_0': … computed … its own variables"):
        collector(Computed())
    with type_error("population_stats, '…BatchNorm_0': … come to it as bfloat16 … as they are"):
        collector(Computed(lambda leaf: leaf.astype(jnp.bfloat16)))
    with value_error("population_stats: its calls share a part … Give each layer its own"):
        collector(Sliced(), jnp.ones((2, 3)))
    with value_error("population_stats: is a NormAndRelu … path not in ['']. Or write a module"):
        collector(NormAndRelu())


def classifier(**options):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.BatchNorm(2, rngs=rngs, **options), nnx.Linear(2, 3, rngs=rngs))


def tented(model=None, **options):
    return tent(model or classifier(), SGD, X, **options)


@while_tracing
def test_tent():
    with type_error("tent: found float for an Optax optimizer … optax.adam(1e-3)"):
        tent(classifier(), 1e-3, X)
    for steps in (0, 1.5, None):
        with value_error("tent: steps= … integer of 1 or more … steps=1"):
            tented(steps=steps)
    with value_error("tent: norms='batch' is unknown … norms='stored'"):
        tented(norms="batch")

    needs = "tent: needs norms with a scale or a bias, found"
    with value_error(f"{needs} 'layers/0' (has no scale"):
        tented(classifier(use_scale=False, use_bias=False))
    with value_error(f"{needs} 'layers/0' (its scale and bias are fro"):
        tented(freeze(classifier(), affine=True).model)
    with value_error("tent: … 'layers/0' (keeps no statistics; norms='all'"):
        tented(nnx.Sequential(nnx.LayerNorm(2, rngs=nnx.Rngs(0))))
    with value_error("tent: … found a model without norms"):
        tented(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))


@while_tracing
def test_predictions():
    for pick, error, says in (
        (lambda logits: (logits, logits), TypeError, "tuple, but needs logits"),
        (lambda logits: logits.argmax(-1), TypeError, "int32[2], but"),
        (lambda logits: logits.mean(), ValueError, "logits of shape ()"),
        (lambda logits: logits[:, :1], ValueError, "logits of shape (2, 1)"),
    ):
        with refused(error, f"tent: the model's call returned {says} … call=lambda model, batch"):
            adaptation = tented(call=lambda model, batch, pick=pick: pick(model(batch)))
            adaptation.step(adaptation.init(), X)
