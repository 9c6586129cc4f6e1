"""The model `Branches` of `tool_models.py` in NumPy, and what its norms see. Float64."""

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxnorm.tools.adapter.models import model_of

EPSILON = 1e-5


class Oracle:
    """Runs the model on batches and says what its norms store afterwards.

    Args:
        model: as the tools take it.
        strength: of how many examples the stored statistics are worth.
        frozen: the statistics of norms that keep theirs.
    """

    def __init__(self, model, strength=0.0, frozen=()):
        adapter = model_of(model, "oracle")
        own = {"params": {}, "batch_stats": {}}
        for key, leaf in adapter.arrays.items():
            kind = adapter.collection(key)
            own[kind][key[1:] if key[0] == kind else key] = np.asarray(leaf, np.float64)
        self.params, self.stored = map(unflatten_dict, own.values())
        self.strength, self.frozen = strength, dict(frozen)

    def together(self, batches):
        """Each norm normalizes by its batch."""
        seen = {}
        for batch in batches:

            def normalize(name, step, inputs):
                seen.setdefault((name, step), []).extend(inputs)
                by = [self._mixed(name, step, x, len(x)) for x in inputs]
                return [
                    self._normalized(name, step, x, stats)
                    for x, stats in zip(inputs, by, strict=True)
                ]

            self._run(np.asarray(batch, np.float64), normalize)
        examples = sum(map(len, batches))
        return {
            place: self._mixed(*place, np.concatenate(values), examples)
            for place, values in seen.items()
        }

    def layer_by_layer(self, batches):
        """Each norm normalizes by what it stores in the end."""
        final = {}
        examples = sum(map(len, batches))

        def normalize(name, step, inputs):
            final[name, step] = self._mixed(name, step, np.concatenate(inputs), examples)
            return [self._normalized(name, step, x, final[name, step]) for x in inputs]

        self._run(np.concatenate(batches).astype(np.float64), normalize)
        return final

    def _mixed(self, name, step, values, examples):
        if (name, step) in self.frozen:
            return self.frozen[name, step]
        seen = values.mean(0), values.var(0)
        stored = self._own(self.stored, name, step)
        share = self.strength / (self.strength + examples)
        return tuple(
            share * stored[role] + (1 - share) * new
            for role, new in zip(("mean", "var"), seen, strict=True)
        )

    def _normalized(self, name, step, x, stats):
        own = self._own(self.params, name, step)
        mean, var = stats
        return (x - mean) / np.sqrt(var + EPSILON) * own["scale"] + own["bias"]

    @staticmethod
    def _own(tree, name, step):
        for part in name.split("/"):
            tree = tree[part]
        return tree if step is None else {role: leaf[step] for role, leaf in tree.items()}

    def _dense(self, name, x, step=None):
        own = self._own(self.params, name, step)
        return x @ own["kernel"] + own["bias"]

    def _run(self, x, normalize):
        first, second = normalize(
            "shared", None, [self._dense("first", x), self._dense("second", x)]
        )
        both = self._dense("both", first + second)
        x = both + normalize("after_branch", None, [both])[0]
        for layer, steps in (("layers", range(3)), ("checkpointed", [None])):
            for step in steps:
                y = self._dense(f"{layer}/dense", x, step)
                x = x + np.tanh(normalize(f"{layer}/norm", step, [y])[0])
