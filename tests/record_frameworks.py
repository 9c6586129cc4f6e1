"""Records what models of Keras, Haiku and Equinox are and do, for `test_import_frameworks.py`.

    KERAS_BACKEND=jax python tests/record_frameworks.py

needs the extra `oracle` and writes `recorded/keras_*.npz` and so on, one file for each model: its
variables by the names of its framework, an input, the output in inference, and the output and the
variables after one step of training, where it has statistics that move.
"""

import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(__file__).parent / "recorded"
IMAGE, LINE, VOLUME = (3, 5, 5, 4), (3, 7, 4), (2, 3, 3, 3, 4)


class Recorded(NamedTuple):
    """One model of a framework, and what it does.

    Attributes:
        arrays: its variables, by name.
        x: an input.
        y: what it gives in inference.
        trained: its variables after one step of training.
        trained_y: what it gave in that step.
    """

    arrays: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    trained: dict[str, np.ndarray]
    trained_y: np.ndarray


def save(name, recorded):
    """Writes a record to the folder."""
    parts = {"x": recorded.x, "y": recorded.y, "trained_y": recorded.trained_y}
    parts |= {f"arrays {key}": leaf for key, leaf in recorded.arrays.items()}
    # Most do not move in one forward pass.
    parts |= {
        f"trained {key}": leaf
        for key, leaf in recorded.trained.items()
        if not np.array_equal(leaf, recorded.arrays[key])
    }
    np.savez_compressed(FOLDER / f"{name}.npz", **parts)


def load(name):
    """Reads a record from the folder."""
    with np.load(FOLDER / f"{name}.npz") as parts:
        named = {
            kind: {key.removeprefix(kind): parts[key] for key in parts if key.startswith(kind)}
            for kind in ("arrays ", "trained ")
        }
        arrays = named["arrays "]
        trained = arrays | named["trained "]
        return Recorded(arrays, parts["x"], parts["y"], trained, parts["trained_y"])


def stirred(key, leaf, generator):
    """A value as after training, which no initializer gives."""
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    last = key.lower()
    if not np.issubdtype(leaf.dtype, np.floating):
        return np.asarray(leaf)
    if any(part in last for part in ("var", "std", "hidden", "ema_state_index[1]")):
        return np.exp(noise / 2)
    is_kernel = leaf.ndim > 1 and leaf.shape[:-1] != (1,) * (leaf.ndim - 1)
    return np.asarray(leaf + 0.3 * noise if not is_kernel else leaf + 0.1 * noise)


def data(shape, seed=0):
    """An input of this shape, off zero."""
    return np.random.default_rng(seed).normal(0.3, 1.2, size=shape).astype(np.float32)


def keras_layers():
    """Models of Keras by name: the shape of the input and the layers."""
    from keras import layers

    return {
        "image": (
            IMAGE,
            [
                layers.Conv2D(6, 3, strides=2, padding="same", groups=2, name="conv"),
                layers.BatchNormalization(name="batch"),
                layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="depthwise"),
                layers.BatchNormalization(renorm=True, momentum=0.9, epsilon=1e-4, name="renorm"),
                layers.SeparableConv2D(5, 3, padding="same", name="separable"),
                layers.LayerNormalization(name="layer"),
                layers.Conv2DTranspose(4, 3, strides=2, name="transposed"),
                layers.LayerNormalization(axis=[1, 2, 3], name="whole"),
                layers.GroupNormalization(2, name="group"),
                layers.GroupNormalization(-1, name="instance"),
                layers.BatchNormalization(center=False, scale=False, name="bare"),
                layers.RMSNormalization(name="rms"),
                layers.Dense(3, name="dense"),
            ],
        ),
        "line": (
            LINE,
            [
                layers.Conv1D(5, 3, dilation_rate=2, name="conv"),
                layers.BatchNormalization(name="batch"),
                layers.Conv1DTranspose(3, 4, name="transposed"),
            ],
        ),
        "volume": (
            VOLUME,
            [
                layers.Conv3D(3, 2, use_bias=False, name="conv"),
                layers.BatchNormalization(name="batch"),
                layers.Conv3DTranspose(2, 2, strides=2, name="transposed"),
            ],
        ),
    }


def record_keras(name, seed=0):
    """A model of Keras and what it does."""
    return recorded_and_model_of_keras(name, seed)[0]


@jax.numpy_rank_promotion("allow")  # Keras promotes ranks
def recorded_and_model_of_keras(name, seed=0):
    """What a model of Keras does, and the model after a step of training."""
    import keras

    shape, layers = keras_layers()[name]
    model = keras.Sequential([keras.Input(shape[1:]), *layers], name="net")
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(stirred(variable.path, np.asarray(variable), generator))
    for layer in layers:
        if getattr(layer, "renorm", False):
            # The three are functions of each other as long as one momentum moves them.
            std = np.sqrt(np.asarray(layer.moving_variance) + layer.epsilon)
            layer.moving_stddev.assign(std)
            layer.renorm_stddev.assign(std)
            layer.renorm_mean.assign(np.asarray(layer.moving_mean))
            layer.renorm_momentum = layer.momentum

    def variables():
        return {variable.path: np.asarray(variable).copy() for variable in model.weights}

    x, arrays = data(shape, seed), variables()
    y = np.asarray(model(x, training=False))
    trained_y = np.asarray(model(x, training=True))
    return Recorded(arrays, x, y, variables(), trained_y), model


def haiku_image(x, training):
    """A model of Haiku for images."""
    import haiku as hk

    x = hk.Conv2D(6, 3, stride=2, feature_group_count=2, name="conv")(x)
    x = hk.BatchNorm(True, True, 0.9, name="batch")(x, training)
    x = hk.DepthwiseConv2D(2, 3, name="depthwise")(x)
    x = hk.LayerNorm(-1, True, True, name="layer")(x)
    x = hk.SeparableDepthwiseConv2D(1, 3, name="separable")(x)
    x = hk.Conv2DTranspose(4, 3, 2, padding="VALID", name="transposed")(x)
    x = hk.LayerNorm((1, 2, 3), True, True, param_axis=(1, 2, 3), name="whole")(x)
    x = hk.GroupNorm(2, name="group")(x)
    x = hk.InstanceNorm(True, True, name="instance")(x)
    x = hk.BatchNorm(False, False, 0.99, name="bare")(x, training)
    x = hk.RMSNorm(-1, name="rms")(x)
    return hk.nets.MLP([5, 3], name="mlp")(x.mean((1, 2)))


def haiku_line(x, training):
    """A model of Haiku for sequences."""
    import haiku as hk

    x = hk.Conv1D(5, 3, rate=2, padding="VALID", name="conv")(x)
    x = hk.BatchNorm(True, True, 0.9, name="batch")(x, training)
    return hk.Conv1DTranspose(3, 4, padding="VALID", name="transposed")(x)


def haiku_volume(x, training):
    """A model of Haiku for volumes."""
    import haiku as hk

    x = hk.Conv3D(3, 2, with_bias=False, padding="VALID", name="conv")(x)
    x = hk.BatchNorm(True, True, 0.9, name="batch")(x, training)
    return hk.Conv3DTranspose(2, 2, stride=2, padding="VALID", name="transposed")(x)


def by_name(tree):
    """The arrays of a dictionary of dictionaries, `module name`."""
    return {
        f"{module} {name}": np.asarray(leaf)
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
    }


def by_module(arrays):
    """The inverse of `by_name`."""
    tree = {}
    for key, leaf in arrays.items():
        module, name = key.split(" ")
        tree.setdefault(module, {})[name] = leaf
    return tree


def record_haiku(name, seed=0):
    """A model of Haiku and what it does."""
    import haiku as hk

    shape = {"image": IMAGE, "line": LINE, "volume": VOLUME}[name]
    function = {"image": haiku_image, "line": haiku_line, "volume": haiku_volume}[name]
    net, x = hk.transform_with_state(function), data(shape, seed)
    params, state = net.init(jax.random.key(seed), x, True)
    _, state = net.apply(params, state, None, data(shape, seed + 1), True)
    generator = np.random.default_rng(seed)
    params = by_module(
        {key: stirred(key, leaf, generator) for key, leaf in by_name(params).items()}
    )
    y, _ = net.apply(params, state, None, x, False)
    trained_y, trained = net.apply(params, state, None, x, True)
    params = by_name(params)
    return Recorded(
        params | by_name(state),
        x,
        np.asarray(y),
        params | by_name(trained),
        np.asarray(trained_y),
    )


def equinox_layers(key):
    """Models of Equinox by name: the shape of the input and the layers."""
    from equinox import nn

    keys = map(lambda i: jax.random.fold_in(key, i), itertools.count())
    return {
        "image": (
            IMAGE,
            {
                "conv": nn.Conv2d(4, 6, 3, 2, padding=1, groups=2, key=next(keys)),
                "batch": nn.BatchNorm(6, "batch", mode="batch", momentum=0.9),
                "depthwise": nn.Conv2d(6, 12, 3, padding=1, groups=6, key=next(keys)),
                "batch again": nn.BatchNorm(12, "batch", mode="batch", eps=1e-4),
                "transposed": nn.ConvTranspose2d(12, 4, 3, 2, key=next(keys)),
                "whole": nn.LayerNorm((4, 7, 7)),
                "group": nn.GroupNorm(2, 4),
                "instance": nn.GroupNorm(4, 4, eps=1e-3),
                "bare": nn.BatchNorm(4, "batch", mode="batch", channelwise_affine=False),
            },
        ),
        "line": (
            LINE,
            {
                "conv": nn.Conv1d(4, 5, 3, dilation=2, key=next(keys)),
                "batch": nn.BatchNorm(5, "batch", mode="batch"),
                "transposed": nn.ConvTranspose1d(5, 3, 4, key=next(keys)),
            },
        ),
        "volume": (
            VOLUME,
            {
                "conv": nn.Conv3d(4, 3, 2, use_bias=False, key=next(keys)),
                "batch": nn.BatchNorm(3, "batch", mode="batch"),
                "transposed": nn.ConvTranspose3d(3, 2, 2, 2, key=next(keys)),
            },
        ),
        "vector": (
            (6, 4),
            {
                "first": nn.Linear(4, 5, key=next(keys)),
                "ema": nn.BatchNorm(5, "batch", mode="ema"),
                "layer": nn.LayerNorm(5),
                "rms": nn.RMSNorm(5, use_bias=False),
                "last": nn.Linear(5, 3, use_bias=False, key=next(keys)),
            },
        ),
    }


def equinox_model(layers):
    """An Equinox module of these layers, one after the other."""
    import equinox as eqx

    class Net(eqx.Module):
        """One layer after the other."""

        layers: list

        def __call__(self, x, state):
            for layer in self.layers:
                if isinstance(layer, eqx.nn.StatefulLayer):
                    x, state = layer(x, state)
                else:
                    x = layer(x)
            return x, state

    return eqx.nn.make_with_state(Net)(list(layers.values()))


def record_equinox(name, seed=0):
    """A model of Equinox and what it does."""
    return recorded_and_model_of_equinox(name, seed)[0]


def recorded_and_model_of_equinox(name, seed=0):
    """What a model of Equinox does, and the module with its state."""
    import equinox as eqx

    from jaxnorm.tools.importing.equinox import equinox_arrays

    shape, layers = equinox_layers(jax.random.key(seed))[name]
    net, state = equinox_model(layers)
    generator, x = np.random.default_rng(seed), data(shape, seed)

    def stir(path, leaf):
        if not eqx.is_array(leaf):
            return leaf
        return jnp.asarray(stirred(jax.tree_util.keystr(path), np.asarray(leaf), generator))

    net = jax.tree_util.tree_map_with_path(stir, net)

    def run(net, state, x):
        """Equinox knows one example, with the features first."""
        each = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = each(np.moveaxis(x, -1, 1), state)
        return np.moveaxis(np.asarray(y), 1, -1), state

    _, state = run(net, state, data(shape, seed + 1))
    y, _ = run(eqx.nn.inference_mode(net), state, x)
    trained_y, trained = run(net, state, x)
    arrays, after = equinox_arrays(net, state), equinox_arrays(net, trained)
    return Recorded(arrays, x, y, after, trained_y), (net, state)


RECORDERS = {
    "keras": (record_keras, ("image", "line", "volume")),
    "haiku": (record_haiku, ("image", "line", "volume")),
    "equinox": (record_equinox, ("image", "line", "volume", "vector")),
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for framework, (record, names) in RECORDERS.items():
        for name in names:
            save(f"{framework}_{name}", record(name))
