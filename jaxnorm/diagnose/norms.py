"""A report on the norms of a model: what they see on a batch, and what is wrong with them.

Use it when a model does not train, or does worse in inference than in training: one call shows
running statistics that lag, dead channels, statistics of too few values, and where NaN comes from.
It looks at one batch; a batch that is not like the data gives a report that is not like the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxnorm.diagnose.norm_measures import Place, measured_places, with_arrays
from jaxnorm.diagnose.norm_rows import NormRow, first_nonfinite, norm_rows
from jaxnorm.diagnose.norm_table import as_text, renderable
from jaxnorm.tools.adapter.calling import example_call
from jaxnorm.tools.adapter.lookalikes import lookalikes
from jaxnorm.tools.adapter.models import Arrays, Path, model_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class NormReport:
    """What a model's norms see on a batch. `print(report)` is a table, `picture` draws it.

    Attributes:
        rows: one for each norm, in the order in which the model calls them.
        nonfinite: where NaN or infinite values come from, in a sentence: the first layer, norm,
            convolution or dense, that makes them of finite input, otherwise the first that receives
            them. None if all layers see and give finite values.
        unseen: by their paths, what was not looked at, and why: norms that are users' own or are
            not called, and layers in a `while_loop`.
    """

    rows: tuple[NormRow, ...]
    nonfinite: str | None
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return as_text(renderable(self.rows, self.nonfinite, self.unseen))

    def __rich__(self) -> Any:
        return renderable(self.rows, self.nonfinite, self.unseen)

    def picture(self) -> "Figure":
        """A figure of matplotlib: the channels of each norm, from the first to the last.

        Returns:
            The figure; `report.picture().savefig("norms.png")` writes it.

        Raises:
            ValueError: there are no norms to draw.
        """
        if not self.rows:
            raise ValueError(
                "NormReport.picture: found 0 norms to draw. Report on a model that calls some: "
                "report_norms(model, x)."
            )
        from jaxnorm.diagnose.norm_picture import picture

        return picture(self.rows)


def report_norms(
    model: Any,
    *args: Any,
    by_batch: bool = False,
    singular_values: bool = True,
    **kwargs: Any,
) -> NormReport:
    """Reports on the norms of a model, those of this library and Flax's, for one call of it.

        shift = |running mean - batch mean| / sqrt(running var + epsilon)
        ratio = (batch var + epsilon) / (running var + epsilon)

    Args:
        model: an `nnx.Module`, or a Linen module bound to its variables, `model.bind(variables)`.
        *args: arguments of the model's call, with arrays of any shape and dtype that it takes.
        by_batch: whether norms with stored statistics normalize by the batch, as in training; by
            default they do as the call says. NNX models are in inference (`eval`) otherwise.
        singular_values: whether to measure the largest and smallest singular value of each norm's
            Jacobian, which takes most of the time.
        **kwargs: other arguments of the call, in Linen `train=False` or what the model has for it.

    Returns:
        A `NormReport`, with one `NormRow` for each norm that the call runs through; of an `nn.scan`
        over layers one for each layer, of a norm that is called twice one in all. Nothing of the
        model changes.

    Raises:
        TypeError: `model` is neither an NNX nor a Linen module.
        ValueError: it is a Linen module without variables.

    Numerics:
        Statistics are float32 or wider, as the layers take them. Singular values are computed in
        float64, of the norm at this input, as jvp and vjp see it; of large norms to 4 digits by
        Lanczos' method, which multiplies the Jacobian some dozen to a few hundred times.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm
        >>> from flax import nnx
        >>> from jaxnorm.diagnose import report_norms
        >>> norm = jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        >>> report = report_norms(norm, jnp.array([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0]]))
        >>> (row,) = report.rows
        >>> row.count, row.shift.round(2).tolist(), row.collapsed.tolist()
        (3, [3.0, 7.0], [False, True])

    Source:
        Lanczos' method with restarts as in ARPACK (Lehoucq, Sorensen & Yang 1998), by SciPy.

    Differs:
        From `nnx.tabulate` and `nn.tabulate`: those show shapes, this shows values.
    """
    who = "report_norms"
    adapted = model_of(model, who)
    leaves, structure = jax.tree.flatten((args, kwargs))
    given = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, given, strict=True) if is_array]
    places: list[Place] = []
    unseen: dict[Path, str] = {}

    @jax.jit
    def measure(variables: Arrays, arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        whole = [
            next(remaining) if is_array else leaf
            for leaf, is_array in zip(leaves, given, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, whole)
        options = dict(by_batch=by_batch, keep_inputs=singular_values)
        places[:], hidden, measured = measured_places(
            adapted, example_call(args, kwargs, who), variables, **options, who=who
        )
        unseen.update(hidden)
        return measured

    similar = lookalikes(adapted, example_call(args, kwargs, who))
    unseen.update({path: each.why for path, each in similar.items()})
    measured = measure(adapted.arrays, arrays)
    seen = with_arrays(places, measured)
    return NormReport(
        rows=norm_rows(adapted, seen, singular_values, who),
        nonfinite=first_nonfinite(adapted, seen),
        unseen={"/".join(path): why for path, why in unseen.items()},
    )
