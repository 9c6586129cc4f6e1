"""States that others made: averages of states, states in half precision, older ones with integers.

Laws of every method that accumulates evidence, whose state has all there is.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from modules import FRAMEWORKS, draw
from subjects import ACCUMULATING, in_turn
from test_accumulation import MAKE, K, assert_nothing_pending, micro_batches, train_on
from test_running_state import SHAPE

import jaxnorm.linen
from jaxnorm.tools import population_stats

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(("subject", "framework"), in_turn(ACCUMULATING, FRAMEWORKS))
def test_an_average_of_states_is_a_state(framework, subject):
    """Of states that wait for different batches, as weight averages and target networks take it.

    All batches are alike, so that it must go on as each of the states would.
    """
    x = subject.input() + 100
    layer = subject.layer(framework, x, momentum=None)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(stats):
        return layer.train(layer.params, stats, x)[1]

    def k_steps(stats):
        return functools.reduce(lambda stats, _: step(stats), range(K), stats)

    chex.clear_trace_counter()
    after = k_steps(layer.stats)
    average = optax.incremental_update(step(after), after, 0.3)
    chex.assert_trees_all_equal_shapes_and_dtypes(average, layer.stats)
    np.testing.assert_allclose(average["pending_batches"], 0.3, rtol=1e-6)
    found, expected = k_steps(average), k_steps(after)
    assert_nothing_pending(found)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("subject", "framework"), in_turn(ACCUMULATING, FRAMEWORKS))
def test_a_state_in_half_precision_is_computed_in_float32(framework, subject):
    """And stored as it was found, with one warning of what that loses."""
    dtype, last = {"linen": (jnp.bfloat16, 256), "nnx": (jnp.float16, 2048)}[framework]
    x = subject.input()
    layer = subject.layer(framework, x, momentum=None)
    train = jax.jit(layer.train)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), train(layer.params, layer.stats, x)[1])
    text = rf"^{subject.method}: trains with .*as {dtype.__name__}.* a count stops at {last}\. Keep"
    with pytest.warns(UserWarning, match=text) as warned:
        y, new = train(layer.params, narrow, x)
    assert len(warned) == 1
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    expected_y, expected = train(layer.params, wide, x)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, expected)
    chex.assert_trees_all_close((y, new), (expected_y, expected), rtol=float(jnp.finfo(dtype).eps))


@MAKE
def test_counts_that_a_checkpoint_has_as_integers_go_on_as_such(make):
    x = draw(SHAPE)
    layer = make(x, update_every=K, momentum=None)
    counts = {name: layer.stats[name].astype(jnp.int32) for name in ("updates", "pending_batches")}
    whole_numbers = layer.stats | counts
    batches = micro_batches(SHAPE, count=K + 1)
    _, _, expected = train_on(layer, batches)
    _, _, found = train_on(layer, batches, stats=whole_numbers)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, whole_numbers)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found), expected
    )


@pytest.mark.parametrize("order", ["together", "layer by layer"])
def test_population_statistics_of_a_model_in_half_precision(order):
    """Taken in float32, stored as found, and without a warning: nothing is averaged there."""
    net = nn.Sequential([norm := jaxnorm.linen.BatchNorm(True), nn.relu, norm.clone()])
    batches = list(micro_batches((8, 3)))
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    narrow = cast(net.init(jax.random.key(0), batches[0]))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    found, expected = (
        population_stats(net.bind(each), batches, order=order).variables["batch_stats"]
        for each in (narrow, wide)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, narrow["batch_stats"])
    chex.assert_trees_all_close(found, cast(expected), rtol=2 * float(jnp.finfo(jnp.bfloat16).eps))
