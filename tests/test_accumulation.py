"""Gradient accumulation: k micro-batches store what they would have stored as one batch.

Laws for every method with running statistics, in Linen and in NNX; the rules against NumPy; then
what counts as a batch, Optax, devices, and checkpoints.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modules import FRAMEWORKS, Layer, draw, draw_mask
from subjects import ACCUMULATING, drawn, in_turn
from test_laws import MOVING
from test_running_state import RULES, SHAPE, assert_state, expected_state

import jaxnorm.linen
import jaxnorm.nnx

EACH = pytest.mark.parametrize("subject", ACCUMULATING, ids=lambda subject: subject.method)
# One of each way to merge or to store; the others share theirs.
KINDS = ("BatchNorm", "InstanceNorm", "BatchRenorm at its limits", "IterNorm")
EACH_KIND = pytest.mark.parametrize(
    "subject",
    [subject for subject in ACCUMULATING if subject.name.startswith(KINDS)],
    ids=lambda subject: subject.method,
)
MAKE = pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
K = 3
PENDING_COUNTS = ("pending_count", "pending_batches")

pytestmark = pytest.mark.usefixtures("quick_compile")


def without_pending(stats):
    return {name: leaf for name, leaf in stats.items() if not name.startswith("pending")}


def pending(stats):
    return {name: leaf for name, leaf in stats.items() if name.startswith("pending")}


def assert_nothing_pending(stats):
    counts = {name: leaf for name, leaf in stats.items() if name.startswith(PENDING_COUNTS)}
    assert counts
    chex.assert_trees_all_equal(counts, jax.tree.map(jnp.zeros_like, counts))


def micro_batches(shape, dtype=jnp.float32, count=K, spread=3.0):
    """Inputs whose means differ by more than their standard deviation."""
    return jnp.stack([draw(shape, dtype, seed) + spread * seed for seed in range(count)])


def whole(batches):
    return batches.reshape(-1, *batches.shape[2:])


def assert_rests_between_steps(first, each):
    """Nothing but what is pending moves, unless with a k-th batch."""
    for name, leaf in without_pending(each).items():
        before = np.concatenate([np.asarray(first[name])[None], leaf[:-1]])
        for i in range(len(leaf)):
            if (i + 1) % K:
                np.testing.assert_array_equal(leaf[i], before[i], err_msg=name)


def train_on(layer: Layer, batches, masks=None, stats=None):
    """Results, all states, the last one. By `lax.scan`: it takes a state that stays alike."""

    def step(stats, inputs):
        x, *mask = inputs
        y, stats = layer.train(layer.params, stats, x, **({"mask": mask[0]} if mask else {}))
        return stats, (y, stats)

    inputs = (batches,) if masks is None else (batches, masks)
    stats = layer.stats if stats is None else stats
    last, (results, each) = jax.jit(lambda *args: jax.lax.scan(step, *args))(stats, inputs)
    return results, each, last


# Laws of all methods


@pytest.mark.parametrize(("subject", "framework"), in_turn(ACCUMULATING, FRAMEWORKS))
def test_micro_batches_store_what_they_would_as_one_batch(x64, framework, subject):
    """Over two steps, with masks and weights that leave unequal counts; in float64, hence exact."""
    x = micro_batches(subject.shape, jnp.float64, 2 * K)
    some = subject.some_weights if framework == "nnx" else subject.some_mask
    masks = jnp.stack([some(seed) for seed in range(2 * K)])
    options = {"param_dtype": jnp.float64, "momentum": {"linen": 0.8, "nnx": None}[framework]}
    layer = subject.layer(framework, x[0], **options)
    plain = subject.layer(framework, x[0], **options, update_every=1)
    _, each, found = train_on(layer, x, masks)
    assert_rests_between_steps(layer.stats, each)
    train, stats = jax.jit(plain.train), plain.stats
    for i in (0, K):
        together, valid = whole(x[i : i + K]), whole(masks[i : i + K])
        _, stats = train(plain.params, stats, together, mask=valid)
    chex.assert_trees_all_close(without_pending(found), stats, rtol=1e-12, atol=1e-12)
    assert_nothing_pending(found)


@EACH_KIND
def test_each_micro_batch_is_normalized_by_itself(subject):
    """The results are those of a layer that has not seen the others; batch renorm's too."""
    x = micro_batches(subject.shape, count=2 * K)
    layer = subject.layer("linen", x[0])
    plain = subject.layer("linen", x[0], update_every=1)
    results, each, _ = train_on(layer, x)
    after_a_step = jax.tree.map(lambda leaf: leaf[K - 1], without_pending(each))
    train = jax.jit(plain.train)
    for i in range(2 * K):
        y, _ = train(plain.params, plain.stats if i < K else after_a_step, x[i])
        np.testing.assert_allclose(results[i], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("subject", "framework"), in_turn(ACCUMULATING, FRAMEWORKS))
def test_state_keeps_its_types_in_strict_modes(framework, subject):
    """Through a step, with narrow input and masks; all of it is float32, the counts too."""
    x, mask = subject.input(jnp.bfloat16), subject.some_mask()
    layer = subject.layer(framework, x, momentum=None, skip_nonfinite=True)

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(stats, x, mask):
        return layer.train(layer.params, stats, x, mask=mask)[1]

    chex.clear_trace_counter()
    stats = jax.tree.map(jnp.copy, layer.stats)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        for _ in range(K + 1):
            stats = step(stats, x, mask)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, layer.stats)
    assert {str(leaf.dtype) for leaf in stats.values()} == {"float32"}
    assert int(stats["pending_batches"]) == 1


@EACH_KIND
def test_no_gradient_passes_through_pending_evidence(subject):
    x = subject.input()
    layer = subject.layer("linen", x, update_every=2)
    _, stats = layer.train(layer.params, layer.stats, x)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(stats, x):
        _, new = layer.train(layer.params, stats, x)
        return sum((new[name].sum() for name in new if name in MOVING), jnp.zeros(()))

    found = gradients(stats, x)
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))


# The rules, against NumPy


@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
@MAKE
def test_state_follows_its_rule_at_large_means(make, options, rule, running_var):
    """In float32, at a mean of 1e4 standard deviations, where micro-batches differ in mean.

    A mean of means forgets how many values each has; a mean of variances, how the means differ.
    """
    x = micro_batches(SHAPE, count=2 * K) + 1.5e4
    masks = jnp.stack([draw_mask(SHAPE, seed) for seed in range(2 * K)])
    layer = make(x[0], update_every=K, running_var=running_var, **options)
    _, _, found = train_on(layer, x, masks)
    two = [leaf.reshape(2, -1, *SHAPE[1:]) for leaf in (x, masks)]
    expected = expected_state(rule, *two, ddof=int(running_var == "unbiased"))
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-7)
    np.testing.assert_allclose(found["var"], expected["var"], rtol=1e-3)
    if "updates" in found:
        np.testing.assert_array_equal(found["updates"], np.full(3, 2, np.int32))


@MAKE
def test_batches_of_unequal_size(make):
    x = draw((12, 2, 3)) * jnp.linspace(1, 9, 12)[:, None, None]
    layer = make(x, update_every=K, momentum=0.8)
    stats = layer.stats
    for part in jnp.split(x, [2, 9]):
        _, stats = layer.train(layer.params, stats, part)
    assert_state(stats, expected_state(RULES["ema"][1], x[None], None))


@MAKE
def test_complex_evidence(make):
    x = micro_batches(SHAPE, jnp.complex64)
    layer = make(x[0], update_every=K, momentum=0.8)
    _, each, found = train_on(layer, x)
    assert each["pending_mean"].dtype == jnp.complex64
    exact = np.asarray(whole(x), np.complex128)
    mean = exact.mean((0, 1))
    assert_state(
        found,
        {"mean": 0.2 * mean, "var": 0.8 + 0.2 * (np.abs(exact - mean) ** 2).mean((0, 1))},
    )


# What counts as a batch, and what it adds


@MAKE
def test_inference_and_frozen_calls_count_for_nothing(make):
    x = micro_batches(SHAPE)
    layer = make(x[0], update_every=K, momentum=0.8)
    _, _, expected = train_on(layer, x)
    stats = layer.stats
    for batch in x:
        # By the running statistics, whatever waits.
        y = layer.infer(layer.params, stats, batch)
        np.testing.assert_allclose(y, batch / np.sqrt(1 + 1e-5), rtol=1e-6)
        _, same = layer.train(layer.params, stats, batch, update_stats=False)
        chex.assert_trees_all_equal(same, stats)
        _, stats = layer.train(layer.params, stats, batch)
    chex.assert_trees_all_close(stats, expected, rtol=1e-6)


def one_left_out(x, harm):
    """Micro-batches of which the second has no evidence: masks, and what is under them."""
    masks = jnp.ones((K, *SHAPE[:2], 1), bool)
    if harm == "masked":
        return x.at[1].set(jnp.nan), masks.at[1].set(False), {}
    return x.at[1, 0, 0, 1].set(harm), masks, {"skip_nonfinite": True}


@pytest.mark.parametrize("harm", ["masked", jnp.nan, 1e30])
@MAKE
def test_a_batch_that_is_left_out_counts(make, harm):
    """As one of the k, so that the others' step comes when the optimizer's does."""
    options, rule = RULES["debiased"]
    x, masks, skip = one_left_out(micro_batches(SHAPE), harm)
    layer = make(x[0], update_every=K, **options, **skip)
    _, each, found = train_on(layer, x, masks)
    np.testing.assert_array_equal(each["pending_batches"], [1, 2, 0])
    assert_state(found, expected_state(rule, whole(x[::2])[None], None))
    assert_nothing_pending(found)


@EACH_KIND
def test_nothing_in_all_of_them_moves_nothing(subject):
    """Masked in the first, NaN in the others."""
    x = jnp.full((K, *subject.shape), jnp.nan)
    masks = jnp.ones((K, *subject.mask), bool).at[0].set(False)
    layer = subject.layer("linen", x[0], momentum=None, skip_nonfinite=True)
    _, each, found = train_on(layer, x, masks)
    np.testing.assert_array_equal(each["pending_batches"], [1, 2, 0])
    chex.assert_trees_all_equal(found, layer.stats)


@MAKE
def test_without_skip_nonfinite_a_feature_is_spoiled(make):
    """Only this one, with the step, and what waits after it is healthy again."""
    x = micro_batches(SHAPE)
    layer = make(x[0], update_every=K, momentum=0.8)
    _, _, stats = train_on(layer, x.at[0, 0, 0, 1].set(jnp.nan))
    np.testing.assert_array_equal(np.isfinite(stats["var"]), [True, False, True])
    healthy = expected_state(RULES["ema"][1], whole(x)[None], None)
    np.testing.assert_allclose(stats["var"][::2], healthy["var"][::2], rtol=1e-5)
    assert_nothing_pending(stats)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_domains_wait_apart(framework):
    """Also where the names of domains look like those of variables."""
    domains = ("a", "mean", "count", "batches")
    x = micro_batches(SHAPE)
    cls = getattr(jaxnorm, framework).AdaBN
    layer, plain = (
        FRAMEWORKS[framework](x[0], cls, domains=domains, update_every=k, momentum=None)
        for k in (K, 1)
    )
    assert len(layer.stats) == len(domains) * len(("mean", "var", "updates", *"1234"))
    stats = layer.stats
    for batch in x:
        for domain, factor in (("a", 1), ("mean", 2)):
            _, stats = layer.train(layer.params, stats, factor * batch, domain=domain)
    for domain, factor, name in (("a", 1, ""), ("mean", 2, "_mean")):
        _, expected = plain.train(plain.params, plain.stats, factor * whole(x), domain=domain)
        for kind in ("mean", "var", "updates"):
            np.testing.assert_allclose(
                stats[kind + name], expected[kind + name], rtol=1e-5, err_msg=domain
            )
    _, stats = layer.train(layer.params, stats, x[0], domain="batches")
    waits = {n for n, leaf in stats.items() if n.startswith(PENDING_COUNTS) and np.any(leaf)}
    assert waits == {"pending_batches_batches", "pending_count_batches"}


# Optax


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = jaxnorm.linen.BatchNorm(
            use_running_average=not train, momentum=0.8, update_every=K, name="norm"
        )
        return nn.Dense(1)(nn.relu(norm(nn.Dense(3, name="first")(x))))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = jaxnorm.nnx.BatchNorm(3, momentum=0.8, update_every=K, rngs=rngs)
        self.last = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def multi_steps():
    return optax.MultiSteps(optax.sgd(0.1), every_k_schedule=K).gradient_transformation()


def trained_linen(x):
    """First layer and statistics before the first of the micro-batches `x`, and after each."""
    model, optimizer = LinenNet(), multi_steps()
    variables = model.init(jax.random.key(0), x[0], train=True)

    def step(state, x):
        params, stats, inner = state

        def loss(params):
            y, new = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return (y**2).mean(), new["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, inner = optimizer.update(gradients, inner, params)
        state = optax.apply_updates(params, updates), stats, inner
        return state, state[:2]

    start = variables["params"], variables["batch_stats"]
    state = (*start, optimizer.init(start[0]))
    _, after = jax.jit(lambda *args: jax.lax.scan(step, *args))(state, x)
    each = jax.tree.map(lambda first, others: np.stack([first, *others]), start, after)
    return each[0]["first"], each[1]["norm"]


def trained_nnx(x):
    """As `trained_linen`."""
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, multi_steps(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, gradients)

    def state():
        parts = nnx.state(model.first), nnx.state(model.norm, nnx.BatchStat)
        return [jax.tree.map(np.array, nnx.to_pure_dict(part)) for part in parts]

    model.train()
    states = [state()]
    for batch in x:
        step(model, optimizer, batch)
        states.append(state())
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


@pytest.mark.parametrize("trained", [trained_linen, trained_nnx], ids=FRAMEWORKS)
def test_statistics_move_when_optax_moves_the_parameters(trained):
    """`MultiSteps` and the layer count alike; each step is that of the whole batch."""
    x = micro_batches((6, 3), count=2 * K)
    first, stats = trained(x)
    for leaf in (first["kernel"], stats["mean"], stats["var"]):
        moved = (leaf[1:] != leaf[:-1]).any(tuple(range(1, leaf.ndim)))
        np.testing.assert_array_equal(moved, [False, False, True] * 2)
    mean, var = np.zeros(3), np.ones(3)
    for i in (0, K):
        # What the norm sees, of the whole batch: by the parameters that its micro-batches share.
        kernel, bias = (np.asarray(first[name][i], np.float64) for name in ("kernel", "bias"))
        seen = np.asarray(whole(x[i : i + K]), np.float64) @ kernel + bias
        mean, var = 0.8 * mean + 0.2 * seen.mean(0), 0.8 * var + 0.2 * seen.var(0)
        np.testing.assert_allclose(stats["mean"][i + K], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"][i + K], var, rtol=1e-5)


# Devices


def on_devices(layer, context):
    """(stats, x[device, ...], mask) -> new statistics, of which there is one for all devices."""

    def train(stats, x, mask):
        return layer.train(layer.params, stats, x, mask=mask)[1]

    if context == "vmap":
        mapped = jax.vmap(train, in_axes=(None, 0, 0), out_axes=None, axis_name="d")
        return jax.jit(mapped)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(
            lambda stats, x, mask: train(stats, x[0], mask[0]),
            mesh=mesh,
            in_specs=(P(), P("d"), P("d")),
            out_specs=P(),
            check_vma=context == "shard_map",
        )
    )


@pytest.mark.parametrize("context", ["shard_map", "shard_map unchecked", "vmap"])
@pytest.mark.parametrize(
    ("framework", "method"), [("linen", "BatchNorm"), ("nnx", "BatchNorm"), ("linen", "IterNorm")]
)
def test_micro_batches_on_devices(framework, method, context):
    """With unequal counts, and none at all on one device."""
    x = micro_batches((4, *SHAPE))
    masks = draw_mask((K, 4, *SHAPE[:2], 1)).at[1, 2].set(False)
    make = functools.partial(
        FRAMEWORKS[framework], x[0, 0], getattr(getattr(jaxnorm, framework), method)
    )
    layer, plain = make(update_every=K, axis_name="d", debias=True), make(debias=True)
    step, stats = on_devices(layer, context), layer.stats
    for batch, mask in zip(x, masks, strict=True):
        stats = step(stats, batch, mask)
    _, expected = plain.train(plain.params, plain.stats, whole(whole(x)), mask=whole(whole(masks)))
    chex.assert_trees_all_close(without_pending(stats), expected, rtol=1e-5, atol=1e-5)
    assert_nothing_pending(stats)


@pytest.mark.parametrize("spec", [P("d"), P(None, None, "f")], ids=["examples", "features"])
def test_micro_batches_on_explicit_meshes(spec):
    x = micro_batches((4, 2, 4))
    layer = FRAMEWORKS["linen"](x[0], update_every=K)
    _, _, expected = train_on(layer, x)
    mesh = jax.make_mesh((4, 2), ("d", "f"), axis_types=(AxisType.Explicit,) * 2)
    stats = layer.stats
    with jax.set_mesh(mesh):
        train = jax.jit(layer.train)
        for batch in x:
            _, stats = train(layer.params, stats, jax.device_put(batch, spec))
    chex.assert_trees_all_close(jax.device_get(stats), jax.device_get(expected), rtol=1e-5)


# Checkpoints


@EACH
def test_a_checkpoint_without_pending_evidence_serves(subject):
    """In Linen: for inference as it is, and for training from the next batch."""
    x = subject.input()
    layer = subject.layer("linen", x)
    params, stats = drawn(layer.params), without_pending(layer.stats)
    found, expected = (layer.infer(params, each, x) for each in (stats, layer.stats))
    chex.assert_trees_all_equal(found, expected)
    frozen, expected = (
        layer.train(params, each, x, update_stats=False) for each in (stats, layer.stats)
    )
    chex.assert_trees_all_equal(frozen[0], expected[0])
    found, expected = (layer.train(params, each, x) for each in (stats, layer.stats))
    missing = {name for name in layer.stats if name not in found[1]}
    assert all(name.startswith("pending") and name.endswith("_b") for name in missing)
    chex.assert_trees_all_equal(found[1], {name: expected[1][name] for name in found[1]})


@MAKE
def test_a_smaller_number_of_batches_makes_its_step_at_once(make):
    """A run that goes on with smaller k loses nothing of what waits."""
    x = micro_batches(SHAPE, count=4)
    many, few = (make(x[0], update_every=k, momentum=0.8) for k in (5, 2))
    _, _, stats = train_on(many, x[:3])
    _, stats = few.train(few.params, stats, x[3])
    assert_state(stats, expected_state(RULES["ema"][1], whole(x)[None], None))
    assert_nothing_pending(stats)
