"""What the library makes of a draw, on however many devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from random_layers import layer_of
from random_rounding import as_wide


class Trial:
    """A layer as drawn, with inputs, mask, parameters, running statistics and directions.

    Attributes:
        weights: how much each element counts, in float64.
        shown: which elements of a result are compared; what NaN stood for is not.
    """

    def __init__(self, draw):
        self.draw, self.mask = draw, draw.drawn_mask()
        weights = np.ones(draw.shape) if self.mask is None else as_wide(self.mask)
        weights = (weights != 0).astype(float) if draw.mask == "integer" else weights
        self.weights = np.broadcast_to(weights, draw.shape)
        self.shown = np.ones(draw.shape, bool) if draw.harm is None else self.weights > 0
        self.inputs = tuple(
            jnp.where(self.shown, x, jnp.asarray(draw.harm or 0, x.dtype))
            for x in (draw.drawn_input(0), draw.drawn_input(1))
        )
        self.layer = self._layer()
        self.params = self._drawn_params()
        self.stats = self._drawn_stats() if draw.warm else self.layer.stats
        rng = draw.rng(20)
        signs = np.where(self.shown, rng.choice([-1, 1], draw.shape), 0)
        self.along_x = jnp.asarray(draw.scale * signs, draw.dtype)
        self.along_params = {
            name: jnp.asarray(rng.choice([-0.5, 0.5], p.shape), p.dtype)
            for name, p in self.params.items()
        }
        self.cotangent = np.where(self.shown, rng.choice([-1.5, -1, 0.5, 1, 2], draw.shape), 0)

    def _layer(self):
        draw = self.draw
        options = dict(draw.options)
        if draw.context:
            names = draw.names if len(draw.names) > 1 else draw.names[0]
            options |= dict(axis_name=names, axis_index_groups=draw.device_groups)
        local = jnp.split(self.inputs[0], draw.devices, draw.split)[0]
        return layer_of(draw, local, options)

    def _drawn_params(self):
        rng = self.draw.rng(21)
        params = {}
        for name, value in sorted(self.layer.params.items()):
            axis = self.split_of(name)
            if axis is not None:  # the layer has seen the part of one device
                value = jnp.concatenate([value] * self.draw.devices, axis)
            params[name] = value + jnp.asarray(0.3 * rng.normal(size=value.shape), value.dtype)
        return params

    def _drawn_stats(self):
        """As after training on such data."""
        draw, rng = self.draw, self.draw.rng(22)
        warm = {
            "mean": lambda v: draw.scale * (draw.mean + rng.normal(size=v.shape)),
            "var": lambda v: draw.scale**2 * rng.uniform(0.5, 2, v.shape),
            "cov": lambda v: draw.scale**2 * as_wide(v),
        }
        return {
            name: jnp.asarray(warm[name.split("_")[0]](value), value.dtype)
            if name.split("_")[0] in warm
            else value
            for name, value in self.layer.stats.items()
        }

    def split_of(self, name):
        """The axis along which a parameter lies on several devices, or None."""
        draw = self.draw
        if draw.split not in draw.features or name not in ("scale", "bias"):
            return None
        return draw.features.index(draw.split)

    # Calls

    def found(self):
        """Results of two training steps and inference, states after the steps, and a derivative."""
        draw = self.draw

        def call(function, params, stats, x, mask):
            said = {} if mask is None else {"mask": mask}
            return function(params, stats, x, **said, **draw.call)

        def steps(params, stats, xs, mask):
            first, after = call(self.layer.train, params, stats, xs[0], mask)
            if not draw.runs:
                return [first], []
            second, last = call(self.layer.train, params, after, xs[1], mask)
            inference = call(self.layer.infer, params, last, xs[1], mask)
            return [first, second, inference], [stats, after, last]

        def differentiated(params, stats, xs, mask):
            if draw.derivative == "inference":
                return call(self.layer.infer, params, stats, xs[0], mask)
            return call(self.layer.train, params, stats, xs[0], mask)[0]

        steps, differentiated = self._mapped(steps), self._mapped(differentiated)
        cotangent = self._pieces(self.cotangent, draw.split)

        def result(params, x):
            return differentiated(params, self.stats, (x,), self.mask)

        def loss(params, x):
            y = result(params, x)
            return (y.astype(jnp.promote_types(y.dtype, jnp.float32)) * cotangent).sum()

        @jax.jit
        def run(params, xs, directions):
            primals, gradient = (params, xs[0]), jax.grad(loss, (0, 1))
            if draw.derivative == "forward":
                derivative = jax.jvp(result, primals, directions)[1]
            elif draw.derivative == "second":
                derivative = jax.jvp(gradient, primals, directions)[1]
            else:
                derivative = gradient(*primals)
            return steps(params, self.stats, xs, self.mask), derivative

        (results, states), derivative = run(
            self.params, self.inputs, (self.along_params, self.along_x)
        )
        return results, [self._by_device(state) for state in states], derivative

    def _pieces(self, array, axis):
        """The part of an array on each device, along new first axes, or copies."""
        draw = self.draw
        if not draw.context:
            return array
        array = jnp.asarray(array)
        if axis is None or array.shape[axis] == 1:
            return jnp.broadcast_to(array, (*draw.parts, *array.shape))
        stacked = jnp.stack(jnp.split(array, draw.devices, axis))
        return stacked.reshape(*draw.parts, *stacked.shape[1:])

    def _mapped(self, local):
        """`local` on all devices: its results have the mapped axes first."""
        draw = self.draw
        if not draw.context:
            return local

        def in_shards(*arguments):
            lead = len(draw.names)
            own = jax.tree.map(lambda leaf: leaf[(0,) * lead], arguments)
            return jax.tree.map(lambda leaf: leaf[(None,) * lead], local(*own))

        def run(params, stats, xs, mask):
            params = {name: self._pieces(p, self.split_of(name)) for name, p in params.items()}
            stats = jax.tree.map(lambda leaf: self._pieces(leaf, None), stats)
            xs, mask = jax.tree.map(lambda leaf: self._pieces(leaf, draw.split), (xs, mask))
            if draw.context == "vmap":
                mapped = local
                for name in reversed(draw.names):
                    mapped = jax.vmap(mapped, axis_name=name)
                return mapped(params, stats, xs, mask)
            kinds = (AxisType.Auto,) * len(draw.names)
            mesh = jax.make_mesh(draw.parts, draw.names, axis_types=kinds)
            lies = P(*draw.names)
            checked = draw.context == "shard_map"
            return jax.shard_map(
                in_shards, mesh=mesh, in_specs=lies, out_specs=lies, check_vma=checked
            )(params, stats, xs, mask)

        return run

    def _by_device(self, state):
        """The state of each device, in float64 and as it is stored."""
        draw = self.draw
        if not draw.context:
            return [state]
        flat = {k: v.reshape(draw.devices, *v.shape[len(draw.parts) :]) for k, v in state.items()}
        return [{k: v[device] for k, v in flat.items()} for device in range(draw.devices)]

    def whole(self, array):
        """What lies on devices, put together, in float64."""
        draw = self.draw
        array = as_wide(array)
        if not draw.context:
            return array
        stacked = array.reshape(draw.devices, *array.shape[len(draw.parts) :])
        return np.concatenate(list(stacked), draw.split)
