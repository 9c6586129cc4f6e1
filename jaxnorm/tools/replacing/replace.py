"""Replacing the batch norms of a model, with a report, and the way back.

When to use: to train on with batches too small for batch norm (`to("GroupNorm", ...)`), to
fine-tune with the statistics of the pretraining (`frozen()`), to normalize the same number of
examples on any number of devices (`ghost`, `synchronized`). By a method with other statistics
results change at once: a model with group norm in the place of batch norm has to be trained again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxnorm.methods import BatchNorm
from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.adapter.kinds import method_of, spec_of
from jaxnorm.tools.adapter.lookalikes import Lookalike
from jaxnorm.tools.adapter.models import Arrays, Model, Path, fresh, model_of
from jaxnorm.tools.adapter.norms import Only, chosen, norms_of
from jaxnorm.tools.replacing.fitting import initial, kept_of, misfit, slots_of
from jaxnorm.tools.replacing.replacements import By, To


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        path: the names on the way to it.
        before, after: what it was and what it is, with the options that are not the default.
        kept, dropped, new: names of variables that it has as before, no longer, and newly. One that
            starts anew under its old name is both dropped and new.
    """

    path: str
    before: str
    after: str
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A model of which batch norms were replaced; printed, it is a table of them.

    Attributes:
        model: of the kind that was given.
        changed: the layers that were replaced.
        refused: by the path of a batch norm that was left as it was, why.
    """

    model: Any
    changed: tuple[Replacement, ...]
    refused: Mapping[str, str]
    _source: Model = dataclasses.field(repr=False)
    _dropped: Arrays = dataclasses.field(repr=False)

    @property
    def way_back(self) -> str:
        """What `restored` brings back."""
        if not self._dropped:
            return "restored() has the old layers with all variables as they are by then"
        names = _names(tuple(sorted({key[-1] for key in self._dropped})))
        return (
            f"restored() has the old layers with {names} as of now, and all other variables as "
            f"they are by then; after training, estimate the statistics anew"
        )

    def restored(self, model: Any = None) -> Any:
        """The model with its old layers again.

        Variables that were kept have the values they have in `model`, trained or not. Those that
        were dropped have the values they had when the layers were replaced. Where nothing was
        trained in between, this is the model as it was.

        Args:
            model: `replaced.model` after training, a bound Linen module or an NNX module; None for
                as it was returned.

        Raises:
            TypeError: no model.
            ValueError: it is not the model with these layers.
        """
        now = model_of(self.model if model is None else model, "restored").arrays | self._dropped
        for key, leaf in self._source.arrays.items():
            if key not in now or jnp.shape(now[key]) != jnp.shape(leaf):
                found = f"of shape {jnp.shape(now[key])}" if key in now else "missing"
                raise ValueError(
                    f"restored: '{'/'.join(key)}' is {found}, but was of shape {jnp.shape(leaf)}. "
                    f"Give the model that was replaced, trained: replaced.restored(model)."
                )
        return self._source.rebuilt({key: now[key] for key in self._source.arrays})

    def __str__(self) -> str:
        rows = [("path", "from", "to", "kept", "dropped", "new")]
        for each in self.changed:
            kept, dropped, new = map(_names, (each.kept, each.dropped, each.new))
            rows.append((each.path, each.before, each.after, kept, dropped, new))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines = lines if self.changed else ["nothing was replaced"]
        lines += [f"left: {path}: {reason}" for path, reason in self.refused.items()]
        lines += [f"way back: {self.way_back}"] if self.changed else []
        return "\n".join(lines)


def replace(model: Any, by: By, *args: Any, only: Only = None, **kwargs: Any) -> Replaced:
    """A model with other layers in the place of its batch norms.

    The model's code stays as it is: it goes on calling its layers as before, and the new ones leave
    out of a call what they have no use for. The new layers are those of `jaxnorm.linen` or
    `jaxnorm.nnx`, with the options of the old ones that they have too. Variables that the new layer
    has under the same name, in the same shape, are kept; statistics only together.

    Args:
        model: a Linen module bound to its variables, or an NNX module. It is not changed.
        by: what to put instead: `to(method, **options)`, `frozen()`, `ghost(size)`,
            `synchronized(axis_name)` or `unsynchronized()`.
        *args, **kwargs: an example call of the model, by which its layers and their inputs are
            found.
        only: which batch norms, a pattern of paths such as `"block1/*"`, in which a star stands for
            anything, also for `/`, or a function of the path; None for all.

    Returns:
        A `Replaced`: the model, which layers changed and how, and which did not and why. Other
        variables have the same names and values as before; nothing is shared with `model`. A Linen
        model is bound: `module, variables = replaced.model.unbind()`.

    Raises:
        TypeError: no model; a `by` of another kind; an `only` that is no text and no function.
        ValueError: a Linen module without variables or without a call; no batch norm is meant.

    Numerics:
        New variables have their initial values. A layer that keeps all its variables gives the
        same results in inference; by another method, results change at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import replace
        >>> from jaxnorm.tools import to
        >>> model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> replaced = replace(model, to("GroupNorm", num_groups=2), jnp.ones((3, 4)))
        >>> change = replaced.changed[0]
        >>> change.path, change.after, change.kept, change.dropped
        ('layers/0', 'GroupNorm(num_groups=2, epsilon=1e-05)', ('bias', 'scale'), ('mean', 'var'))
        >>> type(replaced.restored().layers[0]).__name__
        'BatchNorm'

    Differs:
        From the conversions of PyTorch and timm: a user's subclass of batch norm with a `__call__`
        of its own, such as one with an activation, is not replaced by a layer without it, but left
        and named.
    """
    who = "replace"
    held = model_of(model, who)
    if not isinstance(by, By):
        raise TypeError(
            f"{who}: by={by!r} does not say what to put instead. Use frozen(), ghost(16), "
            f"synchronized('batch'), unsynchronized() or to('GroupNorm', num_groups=8)."
        )
    norms = norms_of(held, model, args, kwargs, who)
    batch_norms = {path: norm for path, norm in norms.items() if _is_batch_norm(norm)}
    if not batch_norms:
        kinds = {
            "/".join(path): norm.why if isinstance(norm, Lookalike) else type(norm).__name__
            for path, norm in norms.items()
        }
        others = [f"'{path}' ({kind})" for path, kind in kinds.items()]
        raise ValueError(
            f"{who}: found no batch norm, but {', '.join(others) or 'a model without norms'}. Give "
            f"a model with a batch norm that it calls. The way back from other norms is that of "
            f"the report that brought them: replaced.restored(model)."
        )
    calls = held.layers(example_call(args, kwargs, who))
    arrays, dropped = dict(held.arrays), {}
    layers, changed, refused = {}, [], {}
    for path, layer in chosen(batch_norms, only, who).items():
        name, here = "/".join(path), calls.get(path, [])
        if isinstance(layer, Lookalike):
            refused[name] = layer.why
            continue
        if isinstance(by, To) and (reason := misfit(held, by, layer, here, path)):
            refused[name] = reason
            continue
        before = _variables_of(held, path)
        kept, new = set(before), {}
        if isinstance(by, To):
            slots = slots_of(by, layer, here[0])
            kept = kept_of(slots, here[0])
            slots = {name: slot for name, slot in slots.items() if name not in kept}
            new = initial(held, slots, path, here[0])
        gone = set(before) - kept
        dropped |= {before[variable]: arrays.pop(before[variable]) for variable in gone}
        arrays |= new
        layers[path] = by(layer) if isinstance(layer, nnx.Module) else by
        changed.append(
            Replacement(
                path=name,
                before=f"{_library(layer)}.{described(spec_of(layer))}",
                after=described(by.spec(layer)) if isinstance(by, To) else str(by),
                kept=tuple(sorted(kept)),
                dropped=tuple(sorted(gone)),
                new=tuple(sorted(key[-1] for key in new)),
            )
        )
    return Replaced(held.rebuilt(arrays, layers), tuple(changed), refused, held, fresh(dropped))


def _is_batch_norm(norm: Any) -> bool:
    """Whether a norm is a batch norm, or one by its variables, if it is not known."""
    if isinstance(norm, Lookalike):
        return norm.has_statistics
    return method_of(norm) is BatchNorm


def _variables_of(model: Model, path: Path) -> dict[str, Path]:
    """Where in `arrays` the parameters and statistics of the layer at `path` are, by name."""
    return {
        key[-1]: key
        for key in model.arrays
        if key == model.key(path, key[-1]) and model.collection(key) in ("params", "batch_stats")
    }


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "-"


def _library(layer: Any) -> str:
    """Whose class a layer is of."""
    return type(layer).__module__.split(".")[0]


def described(spec: Any) -> str:
    """A method with the options that are not its defaults, initializers left out."""
    options = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in dataclasses.fields(spec)
        if not field.name.endswith("_init")
        and field.name != "use_running_average"
        and getattr(spec, field.name) != field.default
    ]
    return f"{type(spec).__name__}({', '.join(options)})"
