"""Filling a model with the variables of another: what goes where, and what does not fit.

The reader of a framework (`torch.py`, `keras.py`, ...) says what the arrays of one layer are; all
else is here: which layer is which, shapes, dtypes, options, and one list of all that is wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.tools.adapter.models import Arrays, Path, Run, model_of
from jaxnorm.tools.importing.layouts import axes_of_dense_general
from jaxnorm.tools.importing.names import Names, Stack, check_paths, names_of
from jaxnorm.tools.importing.options import SourceOptions, check_told, differing_options
from jaxnorm.tools.importing.report import ImportReport
from jaxnorm.tools.importing.targets import VARIABLE, TargetLayer, target_layers
from jaxnorm.tools.importing.values import fit

NOTHING: Mapping[str, Any] = MappingProxyType({})


class SourceLayer(NamedTuple):
    """A layer of the source, as its reader gives it for one layer of the model.

    Attributes:
        arrays: by role, see `TargetLayer.keys`, in the layout of the model's layer.
        keys: by role, the local keys (what follows the layer's name) of which the array is made.
        options: what is seen of the source's options in the arrays: `zero_centered_scale=True`
            says that the scale is stored minus 1; anything else is compared with the model's layer.
        droppable: roles that the model's layer need not have, such as a count of batches.
        notes: what the user should know.
        problems: what must be said before the layer can be filled, with the fix.
    """

    arrays: Mapping[str, np.ndarray]
    keys: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = NOTHING
    droppable: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """What is imported.

    Attributes:
        framework: the row of `presets.py`: `"torch"`, `"keras"`, ...
        arrays: all arrays by key; a layer's keys begin with its name and the separator.
        read: gives the arrays of a layer for a layer of the model, from those below the source
            layer's name, by their local keys. What it does not know it leaves out.
        separator: between the names in keys.
        options: of the source's layers, by their names, where they are known.
        spare: keys of arrays that are tied, and have another key that is not among these.
    """

    framework: str
    arrays: Mapping[str, np.ndarray]
    read: Callable[[TargetLayer, Mapping[str, np.ndarray]], SourceLayer]
    separator: str = "."
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    spare: frozenset[str] = frozenset()

    def below(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of the layer `name`, by local keys; of the whole source for the name ""."""
        start = f"{name}{self.separator}" if name else ""
        return {
            key.removeprefix(start): leaf
            for key, leaf in self.arrays.items()
            if key.startswith(start)
        }

    def key(self, name: str, local: str) -> str:
        """The whole key of a local one."""
        return f"{name}{self.separator}{local}" if name else local


class Imported(NamedTuple):
    """The filled model, and what was done."""

    model: Any
    report: ImportReport


def import_layers(
    model: Any,
    source: Source,
    run: Run,
    *,
    names: Names | None = None,
    source_options: SourceOptions | Literal["same"] | None = None,
    channels_first: Mapping[str, bool | tuple[int, ...]] | None = None,
    partial: bool = False,
    who: str,
) -> Imported:
    """Fills the layers of a model with the arrays of a source.

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables.
        source: what is imported.
        run: calls the model once, so that its layers are seen; only shapes are computed.
        names: by the path of a layer, or of a module around layers, `"block1/norm1"`, the name in
            the source; or a function from the one to the other. Where nothing is said the two are
            alike. A tuple of names stacks layers along axis 0, as `nn.scan` does; `Stack` along
            another. `Tied` names are those of the same arrays. A variable of no known layer is
            named by its own path.
        source_options: the options that the source's layers had, by kind or path of the layer:
            `{"BatchNorm": dict(epsilon=1e-3)}`; those not given are the framework's defaults.
            `"same"` says they are those of the model.
        channels_first: by the path of a layer, how features of several axes lie in the source:
            for a dense layer behind a flattened image `(channels, height, width)`; for a norm with
            several feature axes whether the channels come first (True), or as in the model (False).
        partial: whether what does not fit is only reported and keeps the values that it has.
        who: the name that error messages give to the caller.

    Raises:
        TypeError: no model, names or options of another type.
        ValueError: anything that does not fit, all at once; names of nothing.
    """
    held = model_of(model, who)
    targets = target_layers(held, run)
    by_name = {target.name: target for target in targets}
    named = names_of(names, by_name, source.separator, who)
    layouts = channels_first or {}
    check_paths("channels_first", layouts, by_name, who)
    told = {} if source_options is None else source_options
    if told != "same":
        check_told(told, targets, who)
    filling = _Filling(source, held.arrays, told)
    for target in targets:
        target = dataclasses.replace(target, channels_first=layouts.get(target.name))
        for name in named[target.name]:
            read = filling.fill(target, name)
            if target.layer is not None and read.arrays and told != "same":
                for found in differing_options(target, source.framework, read.options, told):
                    where = filling.options if found.serious else filling.notes
                    _add(where, found.says, target.name)
    report = filling.report()
    if filling.unsaid or filling.options or not (partial or report.fits):
        raise ValueError(_says(filling, report, partial, who))
    return Imported(held.rebuilt({**held.arrays, **filling.filled}), report)


class _Filling:
    """What is found on the way."""

    def __init__(self, source: Source, arrays: Arrays, told: SourceOptions | Literal["same"]):
        self.source, self.arrays, self.told = source, arrays, told
        self.filled: Arrays = {}
        # Of what each was made, as a variable that is tied is filled again.
        self.made_of: dict[Path, str] = {}
        self.copied: dict[str, str] = {}
        self.used: set[str] = set()
        self.dropped: set[str] = set()
        self.missing: list[tuple[Path, str]] = []
        self.misshaped: list[str] = []
        self.refused: list[str] = []
        self.transposed: list[str] = []
        self.unsaid: list[str] = []
        # By what is said, the layers of which it is.
        self.options: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def fill(self, target: TargetLayer, name: str | Stack) -> SourceLayer:
        """Fills the variables of a layer, or says why not."""
        names = name.names if isinstance(name, Stack) else (name,)
        layers = [self._read(target, each) for each in names]
        first = layers[0]
        for note in dict.fromkeys(note for layer in layers for note in layer.notes):
            _add(self.notes, note, target.name)
        for fix in dict.fromkeys(fix for layer in layers for fix in layer.problems):
            self.unsaid.append(f"'{target.name}': {fix}")
        for role in first.droppable - target.keys.keys():
            self.dropped |= self._keys(layers, names, role)
        zero_centered = bool(getattr(target.layer, "zero_centered_scale", False))
        for role, key in target.keys.items():
            who = "/".join(part for part in (target.name, role) if part)
            if role.startswith("pending_") and role not in first.arrays:
                # Evidence that waits for a step: there is none for statistics from elsewhere.
                self.filled[key] = jnp.zeros_like(self.arrays[key])
                continue
            found = [layer.arrays.get(role) for layer in layers]
            present = [leaf for leaf in found if leaf is not None]
            if len(present) < len(found) or not present:
                self.missing.append((key, f"'{who}' (from {_text(name)})"))
                continue
            if role == "scale":
                own = self._is_zero_centered(target, first)
                present = [shifted(leaf, int(own) - int(zero_centered)) for leaf in present]
            keys = self._keys(layers, names, role)
            self.used |= keys
            if self._put(target, role, who, present, name, sorted(keys)):
                self.copied[who] = ", ".join(sorted(keys))
        return first

    def _read(self, target: TargetLayer, name: str) -> SourceLayer:
        if target.kind == VARIABLE:
            leaf = self.source.arrays.get(name)
            return SourceLayer({}, {}) if leaf is None else SourceLayer({"": leaf}, {"": ("",)})
        read = self.source.read(target, self.source.below(name))
        return read._replace(options={**self.source.options.get(name, NOTHING), **read.options})

    def _is_zero_centered(self, target: TargetLayer, read: SourceLayer) -> bool:
        """Whether the source stores the scale of a layer minus 1."""
        option = "zero_centered_scale"
        if isinstance(self.told, str):
            return bool(read.options.get(option, getattr(target.layer, option, False)))
        told = {**self.told.get(target.kind, NOTHING), **self.told.get(target.name, NOTHING)}
        return bool({**read.options, **told}.get(option, False))

    def _keys(self, layers: list[SourceLayer], names: tuple[str, ...], role: str) -> set[str]:
        return {
            self.source.key(name, local) if local else name
            for name, layer in zip(names, layers, strict=True)
            for local in layer.keys.get(role, ())
        }

    def _put(
        self,
        target: TargetLayer,
        role: str,
        who: str,
        found: list[np.ndarray],
        name: str | Stack,
        keys: list[str],
    ) -> bool:
        """Whether the arrays have the shape of the variable, and numbers that it can have."""
        key = target.keys[role]
        old = self.arrays[key]
        made_of = ", ".join(map(repr, keys))
        stacked = f" of {len(found)}" if isinstance(name, Stack) else ""
        new = _together(found, name)
        if new is None or new.shape != old.shape:
            shapes = ", ".join(map(str, sorted({leaf.shape for leaf in found})))
            says = (
                f"'{who}' {old.dtype}{old.shape} from {made_of}{stacked} {found[0].dtype}{shapes}"
            )
            turned = [axes_of_dense_general(leaf.T, target, role) for leaf in found]
            fits = getattr(_together(turned, name), "shape", None) == old.shape
            if fits and found[0].ndim == 2 and len(keys) == len(found):
                self.transposed += keys
                says += ", which fits transposed"
            self.misshaped.append(says)
            return False
        epsilon = float(getattr(target.layer, "epsilon", 0.0))
        values, problem, notes = fit(new, old.dtype, role, epsilon)
        if problem is not None:
            self.refused.append(
                f"'{who}' {old.dtype}{old.shape} from {made_of}{stacked} {new.dtype}: {problem}"
            )
            return False
        for note in notes:
            _add(self.notes, note, who)
        if key in self.filled:
            # By bytes, so that NaN equals NaN.
            if np.asarray(self.filled[key]).tobytes() != values.tobytes():
                self.refused.append(
                    f"'{who}' from {made_of}: differs from {self.made_of[key]}, with which the "
                    f"model has one array"
                )
                return False
            return True
        self.made_of[key] = made_of
        self.filled[key] = jax.device_put(jnp.asarray(values), getattr(old, "sharding", None))
        return True

    def report(self) -> ImportReport:
        """What was done so far."""
        arrays = self.source.arrays
        return ImportReport(
            copied=self.copied,
            unused=tuple(
                f"'{key}' {tuple(np.shape(leaf))}"
                for key, leaf in arrays.items()
                if key not in self.used | self.dropped | self.source.spare
            ),
            # What is tied needs to be in the source but once.
            missing=tuple(says for key, says in self.missing if key not in self.filled),
            misshaped=tuple(self.misshaped),
            refused=tuple(self.refused),
            dropped=tuple(key for key in arrays if key in self.dropped - self.used),
            notes=tuple(_listed(self.notes)),
        )


def _says(filling: _Filling, report: ImportReport, partial: bool, who: str) -> str:
    """The error that lists everything that does not fit."""
    parts = [
        f"{title} ({len(entries)}): {', '.join(entries)}"
        for title, entries in (
            ("keys of the source that were not used", () if partial else report.unused),
            ("variables that were not filled", () if partial else report.missing),
            ("shapes that differ", () if partial else report.misshaped),
            ("arrays that are refused", () if partial else report.refused),
            ("layouts that are not said", filling.unsaid),
            ("options that differ", _listed(filling.options)),
        )
        if entries
    ]
    fixes = []
    if not (partial or report.fits):
        fixes.append(
            "Say which layer is which, names={'block1/norm1': 'layer1.0.bn1'}, or with "
            "partial=True import the rest and leave these as they are."
        )
    if filling.transposed and not partial:
        fixes.append(
            f"What fits transposed, as weights of GPT-2 do, give so: {{**arrays, **{{key: "
            f"arrays[key].T for key in {filling.transposed}}}}}."
        )
    if filling.options:
        framework = filling.source.framework
        fixes.append(
            f"Construct layers with the source's options, "
            f"BatchNorm(**{framework}_defaults('BatchNorm')), or say what the source had, "
            f"source={{'BatchNorm': dict(epsilon=1e-3)}}, or source='same'."
        )
    return f"{who}: {'; '.join(parts)}. {' '.join(fixes)}"


def _listed(said: Mapping[str, list[str]]) -> list[str]:
    return [f"{says}: {', '.join(map(repr, layers))}" for says, layers in said.items()]


def _add(said: dict[str, list[str]], says: str, name: str) -> None:
    """Says something of one more layer or variable; once if it is read under several names."""
    names = said.setdefault(says, [])
    if name not in names:
        names.append(name)


def _together(found: list[np.ndarray], name: str | Stack) -> np.ndarray | None:
    """The array of a layer, or those of several stacked; None if they cannot be."""
    try:
        return np.stack(found, name.axis) if isinstance(name, Stack) else found[0]
    except (ValueError, np.exceptions.AxisError):
        return None


def shifted(leaf: np.ndarray, by: int) -> np.ndarray:
    """A scale stored minus 1 as a whole one, or the other way, in float32 or wider."""
    return leaf if by == 0 else leaf.astype(np.promote_types(leaf.dtype, np.float32)) + by


def _text(name: str | Stack) -> str:
    return repr(name.names) if isinstance(name, Stack) else repr(name)
