"""Mistakes with TENT. Part of the table of `test_errors.py`."""

import jax.numpy as jnp
import optax
from flax import nnx
from mistakes import Row

from jaxnorm.tools.replacing.freeze import freeze
from jaxnorm.tools.tent import tent

X = jnp.zeros((4, 2))
SGD = optax.sgd(0.1)


def classifier(classes=3, **options):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.BatchNorm(2, rngs=rngs, **options), nnx.Linear(2, classes, rngs=rngs))


def step(**options):
    adaptation = tent(classifier(), SGD, X, **options)
    return adaptation.step(adaptation.init(), X)


ROWS = [
    Row(
        "adaptation without an optimizer",
        lambda: tent(classifier(), 1e-3, X),
        TypeError,
        r"^tent: found float for an Optax optimizer.*optax\.adam\(1e-3\)",
    ),
    *(
        Row(
            f"adaptation in {steps!r} steps",
            lambda steps=steps: tent(classifier(), SGD, X, steps=steps),
            ValueError,
            r"^tent: steps=.*integer of 1 or more.*steps=1",
        )
        for steps in (0, 1.5, None)
    ),
    Row(
        "adaptation of unknown norms",
        lambda: tent(classifier(), SGD, X, norms="batch"),
        ValueError,
        r"^tent: norms='batch' is unknown.*norms='stored'",
    ),
    Row(
        "adaptation of norms without parameters",
        lambda: tent(classifier(use_scale=False, use_bias=False), SGD, X),
        ValueError,
        r"^tent: needs norms with a scale or a bias, found 'layers/0' \(has no scale",
    ),
    Row(
        "adaptation of frozen parameters",
        lambda: tent(freeze(classifier(), affine=True).model, SGD, X),
        ValueError,
        r"^tent: needs norms with a scale or a bias, found 'layers/0' \(its scale and bias are fro",
    ),
    Row(
        "adaptation of norms without statistics",
        lambda: tent(nnx.Sequential(nnx.LayerNorm(2, rngs=nnx.Rngs(0))), SGD, X),
        ValueError,
        r"^tent: .*'layers/0' \(keeps no statistics; norms='all'",
    ),
    Row(
        "adaptation of a model without norms",
        lambda: tent(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), SGD, X),
        ValueError,
        r"^tent: .*found a model without norms",
    ),
    *(
        Row(
            f"predictions that are {kind}",
            lambda pick=pick: step(call=lambda model, batch: pick(model(batch))),
            error,
            rf"^tent: the model's call returned {says}.*call=lambda model, batch",
        )
        for kind, pick, error, says in (
            ("a pair", lambda logits: (logits, logits), TypeError, r"tuple, but needs logits"),
            ("labels", lambda logits: logits.argmax(-1), TypeError, r"int32\[4\], but"),
            ("one number", lambda logits: logits.mean(), ValueError, r"logits of shape \(\)"),
            ("of one class", lambda logits: logits[:, :1], ValueError, r"logits of shape \(4, 1\)"),
        )
    ),
]
