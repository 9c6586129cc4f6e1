"""What is measured of one step, and the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats


@pytest.fixture
def state(example):
    """An untrained network of one hidden layer that noise follows, and images for it."""
    images = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
    network, optimizer = example.recipe(example.NOISY, 1, 0.5)
    return example.create_state(network, 0, images, optimizer), images


@pytest.mark.usefixtures("quick_compile")
def test_what_is_measured_is_what_the_step_does(example, state):
    """The numbers of one step, put together anew from gradients and outputs."""
    before, images = state
    labels, rate = np.arange(6), 0.5
    after, _ = example.train_step(before, images, labels)
    found = example.measures_of(before, after, images, labels, rate)

    def loss(params):
        return example.loss_of(before, params, images, labels)[0]

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    gradient = jax.jit(jax.value_and_grad(loss))
    start = gradient(before.params)[1]
    seen = [
        gradient(jax.tree.map(lambda p, g, s=size: p - s * g, before.params, start))
        for size in rate * example.MULTIPLES
    ]
    losses = [float(one) for one, _ in seen]
    np.testing.assert_allclose(found.loss_range, max(losses) - min(losses), rtol=1e-3)
    changes = np.array([np.linalg.norm(flat(one) - flat(start)) for _, one in seen])
    np.testing.assert_allclose(found.predictiveness, changes.max(), rtol=1e-3)
    lengths = rate * example.MULTIPLES * np.linalg.norm(flat(start))
    np.testing.assert_allclose(found.smoothness, (changes / lengths).max(), rtol=1e-3)

    mixed = {**before.params, "Layer_0": after.params["Layer_0"]}
    one, two = flat(start["Dense_0"]), flat(gradient(mixed)[1]["Dense_0"])
    np.testing.assert_allclose(found.gradients, np.linalg.norm(two - one), rtol=1e-3)
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-3)

    old, new = (np.asarray(example.outputs_of(one, images), float) for one in (before, after))
    moved = [
        stats.wasserstein_distance(*pair) / pair[0].std()
        for pair in zip(old.T, new.T, strict=True)
        if pair[0].std() > 0
    ]
    assert len(moved) == old.shape[1] > 10
    np.testing.assert_allclose(found.inputs, np.median(moved), rtol=1e-3)


@pytest.mark.usefixtures("quick_compile")
def test_noise_is_drawn_anew_in_each_step_and_left_out_in_inference(example):
    noise = example.Noise((2, 500, 400))
    first, state = noise.init_with_output(jax.random.key(0))
    (scale, shift), kept = noise.apply(state, mutable=["batch_stats"])
    (again, _), _ = noise.apply(state, mutable=["batch_stats"])
    (following, _), _ = noise.apply(kept, mutable=["batch_stats"])
    assert jnp.array_equal(scale, again)
    assert jnp.abs(scale.mean(1) - following.mean(1)).mean() > 0.05
    assert first[0].shape == scale.shape == shift.shape == (2, 500, 400)
    # Of a unit, the mean over images is that of the step, uniform; images vary around it.
    for values, low, high in ((scale, 1, example.STD), (shift, -example.MEAN, example.MEAN)):
        units = np.asarray(values.mean(1)).ravel()
        assert stats.kstest(units, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        around = np.asarray(values - values.mean(1, keepdims=True))
        np.testing.assert_allclose(around.std(), example.JITTER / 3**0.5, rtol=0.05)
        assert np.abs(around).max() < 1.2 * example.JITTER
    from study import eval_step

    images = np.ones((3, 4, 4, 1), np.float32)
    network, optimizer = example.recipe(example.NOISY, 1, 0.5)
    state = example.create_state(network, 0, images, optimizer)
    logits = eval_step(state, images)
    assert jnp.array_equal(logits[0], logits[1])
