"""TENT: the step of the paper on every model, and nothing moves but scales and biases of norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits
from tool_models import branches, image, resnet, vector

import jaxnorm
from jaxnorm.tools.adapter.models import model_of
from jaxnorm.tools.replacing.freeze import freeze
from jaxnorm.tools.tent import _mean_entropy, entropy, tent

pytestmark = pytest.mark.usefixtures("quick_compile")

BUILDERS = {"resnet": resnet, "branches": branches}
INPUTS = {"resnet": image(4), "branches": vector()}
cases = pytest.mark.parametrize("name", BUILDERS)
frameworks = pytest.mark.parametrize("framework", ["linen", "nnx"])


@functools.cache
def built(name, framework):
    """A model of the tests; the NNX twin has the values of the Linen model."""
    model = BUILDERS[name](framework)
    if framework == "linen":
        return model
    values = {key[1:]: leaf for key, leaf in model_of(built(name, "linen"), "test").arrays.items()}
    known = model_of(model, "test")
    return known.rebuilt(known.arrays | values)


def given(name, framework):
    """A model of the tests, and a batch for it."""
    model = built(name, framework)
    return nnx.clone(model) if framework == "nnx" else model, INPUTS[name]


def arrays_of(model):
    known = model_of(model, "test")
    return {
        "/".join(key[1:] if isinstance(model, nn.Module) else key): np.array(leaf)
        for key, leaf in known.arrays.items()
        if known.collection(key) in ("params", "batch_stats")
    }


def batches_like(x, n=3):
    return jnp.stack([x + 0.3 * i * jnp.flip(x, 0) + i for i in range(n)])


def close(a, b, **options):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **(dict(rtol=1e-5, atol=1e-6) | options)),
        a,
        b,
    )


def in_training(model, x, **options):
    """What a model without dropout returns in training."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.train()
        return model(x, **options)
    module, variables = model.unbind()
    return module.apply(variables, x, train=True, mutable=["batch_stats"], **options)[0]


# Against the paper


def entropy_by_hand(x, scale, bias, kernel):
    """The mean entropy of a linear classifier after batch norm, in NumPy."""
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    logits = (normalized * scale + bias) @ kernel
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1).mean()


def classifier(framework, kernel, dtype=jnp.float32):
    """Batch norm and a linear classifier, with statistics that have nothing to do with the data."""
    if framework == "linen":
        module = nn.Sequential([nn.BatchNorm(True, name=None), nn.Dense(kernel.shape[1])])
        stats = {"mean": jnp.full(4, 9, jnp.float32), "var": jnp.full(4, 0.1, jnp.float32)}
        affine = {"scale": jnp.ones(4, dtype), "bias": jnp.zeros(4, dtype)}
        dense = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.zeros(kernel.shape[1], dtype)}
        return module.bind(
            {
                "params": {"layers_0": affine, "layers_1": dense},
                "batch_stats": {"layers_0": stats},
            }
        )
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(4, param_dtype=dtype, rngs=rngs)
    norm.mean[...] += 9
    dense = nnx.Linear(*kernel.shape, param_dtype=dtype, rngs=rngs)
    dense.kernel[...] = jnp.asarray(kernel, dtype)
    return nnx.Sequential(norm, dense)


@frameworks
@pytest.mark.usefixtures("x64")
def test_a_step_goes_down_the_gradient_of_the_entropy(framework):
    generator = np.random.default_rng(0)
    x, kernel = 3 + generator.normal(size=(7, 4)), generator.normal(size=(4, 3))
    adaptation = tent(classifier(framework, kernel, jnp.float64), optax.sgd(1.0), jnp.asarray(x))
    before = adaptation.init()
    logits, after = jax.jit(adaptation.step)(before, jnp.asarray(x))
    expected = entropy_by_hand(x, np.ones(4), np.zeros(4), kernel)
    np.testing.assert_allclose(entropy(logits).mean(), expected, rtol=1e-6)

    start = {"scale": np.ones(4), "bias": np.zeros(4)}
    for name, start_value in start.items():
        (key,) = (key for key in before.params if key.endswith(name))
        for i, h in enumerate(1e-5 * np.eye(4)):
            up, down = (
                entropy_by_hand(x, **(start | {name: start_value + sign * h}), kernel=kernel)
                for sign in (1, -1)
            )
            slope = (before.params[key] - after.params[key])[i]
            np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5, atol=1e-8)


def test_entropy_of_certain_and_of_absent_classes():
    logits = jnp.array([[0.0, 0.0, 0.0], [3e38, -3e38, 0.0], [2.0, 2.0, -jnp.inf]])
    np.testing.assert_allclose(entropy(logits), [np.log(3), 0, np.log(2)], rtol=1e-6)
    slopes = jax.grad(lambda logits: entropy(logits).sum())(logits[:2])
    np.testing.assert_allclose(slopes, jnp.zeros((2, 3)), atol=1e-7)
    assert entropy(logits.astype(jnp.bfloat16)).dtype == jnp.float32


# On whole models


@frameworks
@cases
def test_only_scales_and_biases_of_norms_move(name, framework):
    model, x = given(name, framework)
    before = arrays_of(model)
    adaptation = tent(model, optax.adam(0.02), x)
    step, state = jax.jit(adaptation.step, donate_argnums=0), adaptation.init()
    falling = []
    for _ in range(5):
        logits, state = step(state, x)
        falling.append(float(entropy(logits).mean()))
    assert falling == sorted(falling, reverse=True)

    adapted = adaptation.model(state)
    after = arrays_of(adapted)
    assert after.keys() == before.keys()
    norms = {name.rpartition("/")[0] for name in before if name.endswith("/mean")}
    assert set(adaptation.norms) == norms
    for name, value in after.items():
        moves = name.rpartition("/")[0] in norms and name.endswith(("/scale", "/bias"))
        assert (value != before[name]).any() == moves, name
        assert moves == (name in state.params)

    for leaf in jax.tree.leaves([state, model_of(adapted, "test").arrays]):
        leaf.is_deleted() or leaf.delete()
    again = adaptation.init()
    for array, value in zip(arrays_of(model).values(), before.values(), strict=True):
        np.testing.assert_array_equal(array, value)
    close(again.params, {name: before[name] for name in again.params}, rtol=0, atol=0)


@cases
def test_both_frameworks_scanned_and_in_a_loop_adapt_alike(name):
    results = []
    for framework in ("linen", "nnx"):
        model, x = given(name, framework)
        adaptation = tent(model, optax.adam(0.01), x)
        batches = batches_like(x)
        state, logits = jax.jit(lambda batches, a=adaptation: scanned(a, batches))(batches)
        results.append((logits, state.params))
    close(*results, rtol=1e-3, atol=1e-4)

    step, state = jax.jit(adaptation.step), adaptation.init()
    for i, batch in enumerate(batches):
        found, state = step(state, batch)
        close(found, logits[i], rtol=1e-3, atol=1e-4)
    close(state.params, results[1][1], rtol=1e-3, atol=1e-4)


def scanned(adaptation, batches):
    def step(state, batch):
        logits, state = adaptation.step(state, batch)
        return state, logits

    return jax.lax.scan(step, adaptation.init(), batches)


@frameworks
def test_norms_see_the_batch_whatever_the_call_says(framework):
    model, x = given("branches", framework)
    adaptation = tent(model, optax.sgd(0.1), x)
    close(jax.jit(adaptation.predict)(adaptation.init(), x), in_training(model, x))


@frameworks
def test_episodes_forget_and_steps_add_up(framework):
    kernel = np.random.default_rng(1).normal(size=(4, 3))
    model, x = classifier(framework, kernel), vector()
    once = tent(model, optax.adam(0.1), x)
    step = jax.jit(once.step)
    _, elsewhere = step(once.init(), x + 1)

    expected = once.init()
    for _ in range(3):
        before = once.predict(expected, x)
        logits, expected = step(expected, x)
        close(logits, before)
    episodic = tent(model, optax.adam(0.1), x, steps=3, episodic=True)
    for state in (episodic.init(), elsewhere):
        found, after = jax.jit(episodic.step)(state, x)
        close((found, after.params), (logits, expected.params))
        close(after.opt_state, expected.opt_state)
    _, other = jax.jit(tent(model, optax.adam(0.1), x, steps=3).step)(elsewhere, x)
    assert any((other.params[name] != expected.params[name]).any() for name in other.params)


@frameworks
def test_only_chosen_norms_adapt(framework):
    model, x = given("resnet", framework)
    adaptation = tent(model, optax.sgd(0.1), x, only="block2/*")
    assert set(adaptation.norms) == {f"block2/norm{i}" for i in (1, 2, 3)}
    _, state = jax.jit(adaptation.step)(adaptation.init(), x)
    assert {name.rpartition("/")[0] for name in state.params} == set(adaptation.norms)
    # A shift of the input meets the statistics of the stem, which are stored.
    predict = jax.jit(adaptation.predict)
    assert (jnp.abs(predict(state, x + 1) - predict(state, x)) > 1e-3).any()


# Other norms


class Mixed(nnx.Module):
    """Norms with and without statistics, with and without parameters."""

    def __init__(self, norm, features=4):
        rngs = nnx.Rngs(0)
        self.norm = norm(rngs)
        self.rows = nnx.LayerNorm(features, rngs=rngs)
        self.plain = nnx.BatchNorm(features, use_scale=False, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(features, 3, rngs=rngs)

    def __call__(self, x, **call):
        x = self.norm(x, **call)
        return self.head(self.plain(self.rows(x)))


class Activated(nnx.BatchNorm):
    """A user's batch norm that does more."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return nnx.relu(super().__call__(x, use_running_average, mask=mask))


def test_norms_without_statistics_adapt_on_demand():
    x = vector()
    model = Mixed(lambda rngs: nnx.BatchNorm(4, rngs=rngs))
    adaptation = tent(model, optax.sgd(0.1), x)
    assert set(adaptation.norms) == {"norm", "plain"}
    assert list(adaptation.left) == ["rows"]
    assert "norms='all'" in adaptation.left["rows"]
    everything = tent(model, optax.sgd(0.1), x, norms="all")
    assert set(everything.norms) == {"norm", "plain", "rows"}
    _, state = jax.jit(everything.step)(everything.init(), x)
    assert set(state.params) == {
        f"{norm}/{p}" for norm in ("norm", "rows") for p in ["scale", "bias"]
    }
    source = arrays_of(model)
    assert all((value != source[name]).any() for name, value in state.params.items())


def test_a_user_s_norm_is_left_as_it_is():
    x = vector()
    model = Mixed(lambda rngs: Activated(4, rngs=rngs))
    adaptation = tent(model, optax.sgd(0.1), x, norms="all")
    assert adaptation.left == {"norm": "Activated has a call of its own"}
    assert adaptation.norms == ("rows", "plain") or set(adaptation.norms) == {"rows", "plain"}


STORED = {
    "BatchNorm": dict(momentum=None, update_every=2),
    "BatchRenorm": dict(rmax=2.0, dmax=1.0),
    "AdaBN": dict(domains=("here", "there"), domain="there"),
    "SwitchableNorm": {},
    "IBNa": {},
    "InstanceNorm": dict(track_running_stats=True),
    "IterNorm": dict(num_groups=2),
    "DecorrelatedBatchNorm": dict(num_groups=2),
    "ghosts": dict(ghost_batch_size=2),
    "unmapped": dict(axis_name="devices"),
    "narrow": dict(dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("kind", STORED)
def test_every_norm_with_statistics_normalizes_as_in_training(kind):
    x = jnp.stack([vector(8), 2 - vector(8)], 1)
    method, options = getattr(jaxnorm.nnx, kind, jaxnorm.nnx.BatchNorm), dict(STORED[kind])
    model = nnx.Sequential(method(4, rngs=nnx.Rngs(0), **options))
    adaptation = tent(model, optax.sgd(0.1), x)
    state = adaptation.init()
    assert {"layers/0/scale", "layers/0/bias"} <= set(state.params)
    found = jax.jit(adaptation.predict)(state, x)
    if kind == "unmapped":
        model.layers[0].axis_name = None
    expected = nnx.jit(in_training)(model, x)
    assert found.dtype == expected.dtype
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_variables_may_be_flat():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)

    class Flat(nnx.Module):
        def __init__(self):
            self.norm = jaxnorm.nnx.BatchNorm(6, axis=(1, 2), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    adaptation = tent(Flat(), optax.sgd(0.1), x)
    logits, state = adaptation.step(adaptation.init(), x)
    close(logits, jaxnorm.batch_norm(x, axis=(1, 2))[0])
    assert state.params["norm/scale"].shape == (6,)


# Masks and hostile settings


def test_what_does_not_count_does_not_matter():
    x = vector(5)
    model = Mixed(lambda rngs: jaxnorm.nnx.BatchNorm(4, rngs=rngs))
    model.plain = jaxnorm.nnx.LayerNorm(4, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    counts = jnp.arange(7) < 5
    padded = jnp.concatenate([x, jnp.full((2, 4), 1e3)])
    call = lambda model, batch: model(batch[0], mask=batch[1][:, None])  # noqa: E731
    adaptation = tent(model, optax.sgd(1.0), (padded, counts), call=call, norms="all")
    everything = jnp.ones(5, jnp.bool_)
    _, expected = jax.jit(adaptation.step)(adaptation.init(), (x, everything))
    _, found = jax.jit(adaptation.step)(adaptation.init(), (padded, counts), counts)
    close(found.params, expected.params)

    nothing = jnp.zeros(7, jnp.bool_)
    _, still = jax.jit(adaptation.step)(adaptation.init(), (padded, counts), nothing)
    close(still.params, adaptation.init().params, rtol=0, atol=0)


def test_a_masked_nan_does_no_harm():
    logits = jnp.array([[0.0, 1.0, 3.0], [jnp.nan, 0.0, jnp.inf], [0.0, 0.0, 1.0]])
    mask = jnp.array([True, False, True])
    slope = jax.grad(lambda logits: _mean_entropy(logits, mask, "test"))(logits)
    kept = jax.grad(lambda logits: entropy(logits).mean())(logits[mask])
    close(slope, jnp.zeros((3, 3)).at[mask].set(kept))
    weights = jnp.array([0.25, 0.0, 0.5])
    expected = np.average(entropy(logits[mask]), weights=weights[mask])
    close(_mean_entropy(logits, weights, "test"), expected)


def test_a_batch_that_is_not_finite_teaches_nothing():
    """Neither the parameters nor the optimizer: a NaN, and a gradient whose square overflows."""
    model, x = classifier("linen", np.eye(4)), vector()
    adaptation = tent(model, optax.adam(0.1), x)
    step = jax.jit(adaptation.step)
    _, state = step(adaptation.init(), x)
    logits, after = step(state, x.at[0, 0].set(jnp.nan))
    assert not jnp.isfinite(logits).all()
    close(after, state._replace(skipped=jnp.int32(1)))
    _, after = step(after, x)
    close(after, step(state, x)[1]._replace(skipped=jnp.int32(1)))

    steep = tent(model, optax.chain(optax.scale(1e30), optax.adam(0.1)), x)
    state = steep.init()
    close(steep.step(state, x)[1], state._replace(skipped=jnp.int32(1)))


@frameworks
def test_strict_promotion_and_nan_checks_are_kept(framework):
    model, x = classifier(framework, np.eye(4)), 1e5 * vector()
    adaptation = tent(model, optax.sgd(0.1), x, steps=2)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        logits, _ = jax.jit(adaptation.step)(adaptation.init(), x, jnp.ones(6, jnp.bool_))
    assert jnp.isfinite(logits).all()


# It helps


def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(nn.Dense(64, use_bias=False)(x)))
        return nn.Dense(10)(x)


def trained_network(x, labels, steps=150):
    module, adam = Network(), optax.adam(5e-3)
    variables = module.init(jax.random.key(0), x[:2])

    def step(carry, i):
        variables, state = carry
        here = jax.random.randint(jax.random.key(i), (128,), 0, len(x))

        def loss(params):
            logits, updated = module.apply(
                {**variables, "params": params}, x[here], train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[here])
            return losses.mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = adam.update(gradient, state)
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **updated}, state), None

    start = (variables, adam.init(variables["params"]))
    (variables, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return variables


def test_accuracy_on_shifted_digits_improves():
    x, labels = digits()
    variables = jax.jit(lambda: trained_network(x[:1000], labels[:1000]))()
    model = Network().bind(variables)
    images = x.reshape(-1, 8, 8)
    blurred = sum(jnp.roll(images, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    noise = jax.random.normal(jax.random.key(2), x.shape)
    shifted = (blurred.reshape(-1, 64) + 0.05 * noise)[1000:1768].reshape(6, 128, 64)
    truth = labels[1000:1768].reshape(6, 128)

    adaptation = tent(model, optax.adam(0.01), shifted[0])

    @jax.jit
    def before_and_after():
        start = adaptation.init()
        state, _ = scanned(adaptation, jnp.concatenate([shifted] * 5))
        return [
            jax.lax.map(lambda batch, s=s: adaptation.predict(s, batch), shifted)
            for s in (start, state)
        ]

    def accuracy(logits):
        return float((logits.argmax(-1) == truth).mean())

    by_batch, adapted = map(accuracy, before_and_after())
    assert accuracy(model(shifted)) + 0.1 < by_batch < adapted - 0.01


@frameworks
def test_norms_with_frozen_parameters_are_left(framework):
    model, x = given("branches", framework)
    frozen = freeze(model, x, only="shared", affine=True).model
    adaptation = tent(frozen, optax.sgd(0.1), x)
    assert set(adaptation.norms) == {"after_branch", "layers/norm", "checkpointed/norm"}
    assert list(adaptation.left) == ["shared"]
    assert "frozen" in adaptation.left["shared"]
    before = adaptation.init().params
    _, state = jax.jit(adaptation.step)(adaptation.init(), x)
    assert all((state.params[name] != before[name]).any() for name in before)
