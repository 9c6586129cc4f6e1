"""Mistakes with imports from other frameworks. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from mistakes import Row

import jaxnorm
from jaxnorm.tools.importing.equinox import import_equinox
from jaxnorm.tools.importing.flax import import_flax
from jaxnorm.tools.importing.haiku import import_haiku
from jaxnorm.tools.importing.keras import import_keras

X = jnp.ones((2, 3))


def norm(**options):
    layer = jaxnorm.linen.BatchNorm(use_running_average=True, **options)
    return layer.bind(jax.eval_shape(layer.init, jax.random.key(0), X))


def whole_image():
    """A norm over an image of equal sizes, of which no shape says where the channels are."""
    axes = dict(reduction_axes=(1, 2), feature_axes=(1, 2))
    layer, x = jaxnorm.linen.LayerNorm(epsilon=1e-5, **axes), jnp.ones((1, 3, 3))
    model = layer.bind(jax.eval_shape(layer.init, jax.random.key(0), x))
    arrays = {name: np.ones((3, 3), np.float32) for name in ("weight", "bias")}
    return import_equinox(model, arrays, None, x)


def flat_image(shape):
    layer = nn.Dense(2, use_bias=False)
    model = layer.bind(jax.eval_shape(layer.init, jax.random.key(0), X))
    arrays = {"weight": np.ones((2, 3), np.float32)}
    return import_equinox(model, arrays, None, X, channels_first={"": shape})


ONES = np.ones(3, np.float32)
CYCLE: dict = {}
CYCLE["bn"] = CYCLE


class SameNames:
    """A model of Keras, two layers of which have one name."""

    class Variable:
        path = "d/kernel"

        def __array__(self, dtype=None, copy=None):
            return ONES

    variables = (Variable(), Variable())

    def _flatten_layers(self):
        return []


ROWS = [
    *(
        Row(f"variables of {who} that are {kind}", trigger, TypeError, rf"^{who}: {says}")
        for who, kind, trigger, says in (
            (
                "import_keras",
                "an array",
                lambda: import_keras(norm(), ONES, X),
                r"found ndarray, but needs arrays by name.*v\.path: np\.asarray\(v\)",
            ),
            (
                "import_keras",
                "a list",
                lambda: import_keras(norm(), {"gamma": [ONES, "a"]}, X),
                r"'gamma' is list, which is no array",
            ),
            (
                "import_haiku",
                "missing",
                lambda: import_haiku(norm(), None, None, X),
                r"found NoneType.*hk\.transform_with_state.*state=None",
            ),
            (
                "import_haiku",
                "text",
                lambda: import_haiku(norm(), {"bn": {"scale": "ones"}}, {}, X),
                r"'scale' is str, which is no array",
            ),
            (
                "import_equinox",
                "no module",
                lambda: import_equinox(norm(), ONES, None, X),
                r"found ndarray.*equinox_arrays\(module, state\)",
            ),
            (
                "import_flax",
                "a module without variables",
                lambda: import_flax(norm(), [ONES], X),
                r"found list.*model\.bind\(variables\), an nnx\.Module.*nnx\.to_pure_dict",
            ),
        )
    ),
    *(
        Row(f"two arrays of one name, {kind}", trigger, ValueError, f"^{says}.*Rename one")
        for kind, trigger, says in (
            (
                "of layers of Keras",
                lambda: import_keras(norm(), SameNames(), X),
                r"import_keras: 'd/kernel' .*variables\[0\] \(3,\) and variables\[1\] \(3,\)",
            ),
            (
                "nested and not",
                lambda: import_keras(norm(), {"a/b": ONES, "a": {"b": ONES}}, X),
                r"import_keras: 'a/b' .*, variables\['a/b'\] .* and variables\['a'\]\['b'\]",
            ),
            (
                "a parameter and a state",
                lambda: import_haiku(norm(), {"bn": {"scale": ONES}}, {"bn": {"scale": ONES}}, X),
                r"import_haiku: 'bn/scale' .*params\['bn'\]\['scale'\].*state\['bn'\]\['scale'\]",
            ),
            (
                "in two collections",
                lambda: import_flax(norm(), {"params": {"a": ONES}, "batch_stats": {"a": ONES}}, X),
                r"import_flax: 'a' .*'params/a' .* 'batch_stats/a'",
            ),
        )
    ),
    Row(
        "mapping that contains itself",
        lambda: import_keras(norm(), CYCLE, X),
        TypeError,
        r"^import_keras: the mapping at \['bn'\] contains itself",
    ),
    Row(
        "import of a Linen module without variables",
        lambda: import_flax(norm(), nn.BatchNorm(), X),
        ValueError,
        r"^import_flax: the Linen module BatchNorm has no variables.*bind\(variables\)",
    ),
    Row(
        "everything of Keras that does not fit, at once",
        lambda: import_keras(norm(), {"gamma": ONES[:2], "betta": ONES, "moving_mean": ONES}, X),
        ValueError,
        r"^import_keras: .*not used \(1\): 'betta' \(3,\).*not filled \(2\): 'bias'.*'var'.*shapes "
        r"that differ \(1\): 'scale' float32\(3,\) from 'gamma' float32\(2,\).*options that differ "
        r"\(1\): epsilon is 1e-05, the source's 0\.001.*keras_defaults\('BatchNorm'\)",
    ),
    Row(
        "momentum that Haiku does not have",
        lambda: import_haiku(
            norm(),
            {"bn": {"scale": ONES}},
            {},
            X,
            names={"": "bn"},
            source={"BatchNorm": {"decay_rate": 0.9}},
        ),
        ValueError,
        r"^import_haiku: source=\{'BatchNorm': \.\.\.\} has options \['decay_rate'\].*'momentum'",
    ),
    Row(
        "norm over images of equal sizes",
        whole_image,
        ValueError,
        r"^import_equinox: .*features \(3, 3\) may lie channels first.*channels_first=\{'': True\}",
    ),
    Row(
        "image of another size before a dense layer",
        lambda: flat_image((3, 2, 2)),
        ValueError,
        r"^import_equinox: channels_first=\{'': \(3, 2, 2\)\}.*3 inputs.*\(channels, height, w",
    ),
    Row(
        "scans of nothing",
        lambda: import_flax(norm(), {"params": {}}, X, scans={"layers": (0, 1)}),
        ValueError,
        r"^import_flax: scans names \['layers'\], where the model has nothing",
    ),
]
