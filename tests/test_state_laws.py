"""Laws of running statistics, of every method that has some: what is stored, and what is not.

With momentum 0 a layer stores what it saw. From that, all rules of averaging follow.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subjects import LATER, SUBJECTS, drawn
from test_running_state import RULES

pytestmark = pytest.mark.usefixtures("quick_compile")
STORED = ("mean", "var", "cov")
EPSILON = 0.1
TRACKING = [
    subject
    for subject in SUBJECTS
    if hasattr(subject.cls("linen"), "update_stats")
    and (subject.method != "InstanceNorm" or "track_running_stats" in subject.options)
    and (subject not in LATER or subject.method == "InstanceNorm")
]
EACH = pytest.mark.parametrize("subject", TRACKING, ids=lambda subject: subject.name)


def averaged(subject, stats):
    """What the rules average: for batch renormalization, sigma in the place of the variance."""
    kept = {name: np.asarray(stats[name], np.float64) for name in STORED if name in stats}
    if subject.method == "BatchRenorm":
        kept["var"] = np.sqrt(kept["var"] + EPSILON)
    return kept


@EACH
def test_state_is_an_average_of_what_was_seen(subject):
    xs = jnp.stack([(1 + seed) * subject.input(seed=seed) for seed in range(3)])
    masks = jnp.stack([subject.some_weights(seed) for seed in range(3)])
    makes = {
        rule: subject.layer("linen", xs[0], **options, epsilon=EPSILON)
        for rule, (options, _) in RULES.items()
    }
    forgets = subject.layer("linen", xs[0], momentum=0.0, epsilon=EPSILON)

    @jax.jit
    def run(xs, masks):
        def step(layer, stats, inputs):
            return layer.train(layer.params, stats, inputs[0], mask=inputs[1])[1], None

        seen = jax.lax.map(lambda each: step(forgets, forgets.stats, each)[0], (xs, masks))
        return seen, {
            rule: jax.lax.scan(functools.partial(step, layer), layer.stats, (xs, masks))[0]
            for rule, layer in makes.items()
        }

    seen, found = run(xs, masks)
    for rule, (_, average) in RULES.items():
        start, batches = averaged(subject, forgets.stats), averaged(subject, seen)
        expected = {name: average(start[name], batches[name]) for name in start}
        chex.assert_trees_all_close(
            averaged(subject, found[rule]), expected, rtol=1e-5, atol=1e-6, custom_message=rule
        )
        counts = [leaf for name, leaf in found[rule].items() if name in ("updates", "step")]
        assert all((leaf == 3).all() for leaf in counts)


@EACH
def test_inference_repeats_the_training_on_what_it_saw(subject):
    """Apart from instance norm, which trains by each example's own statistics."""
    x, mask = subject.input(), subject.some_weights()
    layer = subject.layer("linen", x, momentum=0.0)

    @jax.jit
    def run(params, x):
        y, new = layer.train(params, layer.stats, x, mask=mask)
        return y, layer.infer(params, new, x, mask=mask)

    y, z = run(drawn(layer.params), x)
    agree = np.allclose(y, z, rtol=1e-4, atol=1e-4)
    assert agree == (subject.method != "InstanceNorm")


@EACH
def test_bessels_correction(subject):
    if subject.method == "BatchRenorm":
        pytest.skip("averages the sigma by which it normalizes")
    x = subject.input()
    layers = [
        subject.layer("linen", x, momentum=0.0, running_var=kind) for kind in ("biased", "unbiased")
    ]
    biased, unbiased = jax.jit(
        lambda x: [layer.train(layer.params, layer.stats, x)[1] for layer in layers]
    )(x)
    # Of an example, or of the batch.
    count = np.prod(x.shape[1:-1] if subject.method == "InstanceNorm" else x.shape[:-1])
    for name in biased:
        factor = count / (count - 1) if name in ("var", "cov") else 1
        np.testing.assert_allclose(unbiased[name], factor * biased[name], rtol=1e-5, atol=1e-6)


@EACH
def test_what_moves_no_statistics(subject):
    """Being told so, and where told to skip such batches, a value that is not finite."""
    x, mask = subject.input(), subject.some_mask()
    plain, skips = (
        subject.layer("linen", x, skip_nonfinite=skip, momentum=None) for skip in (False, True)
    )

    @jax.jit
    def run(x, spoiled, mask):
        y, frozen = plain.train(plain.params, plain.stats, x, mask=mask, update_stats=False)
        steps = [
            layer.train(layer.params, layer.stats, batch)[1]
            for layer, batch in ((plain, spoiled), (skips, spoiled), (skips, x))
        ]
        return y, frozen, steps

    spoiled = x.at[(1,) * x.ndim].set(jnp.nan).at[(0,) * (x.ndim - 1) + (-1,)].set(jnp.nan)
    y, frozen, (unskipped, skipped, moved) = run(x, spoiled, mask)
    assert jnp.isfinite(y).all()
    chex.assert_trees_all_equal((frozen, skipped), (plain.stats, plain.stats))
    second = "cov" if "cov" in moved else "var"
    assert np.isnan(unskipped[second]).any()
    assert all((moved[name] != plain.stats[name]).any() for name in ("mean", second))
