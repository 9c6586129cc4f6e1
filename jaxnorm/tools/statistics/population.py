"""Population statistics: what the norms of a model see over a whole data set.

Ioffe & Szegedy 2015, arXiv:1502.03167, Algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, section 3,
where they are called precise batch norm. Of batches i of count n_i, mean m_i and variance v_i,

    mean = sum n_i m_i / sum n_i
    var  = sum n_i (v_i + |m_i - mean|^2) / sum n_i

When to use: after training, in the place of running averages, which know the last batches only and
saw them with older weights; after weights were averaged (SWA, EMA), where no running statistics
belong to the result. Not where training normalizes by running statistics itself.
"""

from typing import Any

from jaxnorm.tools.adapter.calling import Call, on_batch
from jaxnorm.tools.adapter.norms import Only
from jaxnorm.tools.statistics.passes import Batches, Order, RunningVar, Study


def population_stats(
    model: Any,
    batches: Batches,
    *,
    call: Call = on_batch,
    order: Order = "together",
    running_var: RunningVar = None,
    only: Only = None,
    progress: bool | None = None,
) -> Any:
    """Gives the norms of a model their statistics over a data set.

        mean = sum n_i m_i / sum n_i,   var = sum n_i (v_i + |m_i - mean|^2) / sum n_i

    for all norms with stored statistics, batch norms above all, in one pass over the data or in
    several. What a norm sees depends on how the norms before it normalize, in one of two orders:

    - `"together"`: each norm normalizes by its batch, as in training. One pass.
    - `"layer by layer"`: each norm normalizes by what it finally stores. The result is exactly what
      the norms see in inference. As many passes as norms follow each other, and one more.

    The first norm gets the same from both. So do all where the data are one batch, unless a norm is
    called several times: in training it normalizes each call by itself, in inference all alike.

    Args:
        model: a Linen module bound to its variables, `module.bind(variables)`, or an `nnx.Module`.
        batches: the data: an iterable of batches, or a function that gives one. A batch is an array
            or a tree of arrays, also spread over devices. Batches may differ in size, at the cost
            of a compilation for each size. More than one pass needs a list, or a function.
        call: how the model is called on a batch, in inference: for Linen perhaps
            `lambda model, batch: model(batch["image"], train=False)`; an NNX module is in `eval()`
            already. Masks that the model hands to its norms are honoured.
        order: `"together"` or `"layer by layer"`, see above.
        running_var: `"unbiased"` stores the variance with Bessel's correction, as the paper does,
            `"biased"` without; None for what each norm says.
        only: which norms get statistics: a pattern of paths, `"block1/*"`, or a function of the
            path. The others keep theirs and normalize by them. None for all.
        progress: whether a bar shows how far it is; None for on a terminal only.

    Returns:
        A model of the same kind, with copies of all other variables. Evidence that waited for a
        step (`update_every`) is dropped; counts of steps (`updates`, `step`) stay. Norms that the
        call does not reach, and features of which no value is valid, keep their statistics. So do
        a user's own norms and those in a `while` loop, with a warning that names them.

    Raises:
        TypeError: no model with variables; batches that are none, or that can be gone through only
            once where that is not enough.
        ValueError: no batches; no norms; an unknown `order` or `running_var`; norms that saw
            nothing, or values that are not finite; statistics that do not settle.

    Numerics:
        Statistics are taken in float32 or wider and merged by pairs, so that rounding grows with
        the logarithm of the number of batches, also at means of many standard deviations.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.tools import population_stats
        >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[7.0], [11.0]])]
        >>> exact = population_stats(norm, batches)
        >>> exact.mean[...].round(3).tolist(), exact.var[...].round(3).tolist()
        ([5.0], [18.5])

    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), Algorithm 2; Wu & Johnson 2021 (arXiv:2105.07576),
        section 3.

    Differs:
        From Algorithm 2, which averages the variances within batches: here the means' spread
        between batches counts too, and batches weigh by their sizes.
    """
    return Study(
        model,
        batches,
        "population_stats",
        call=call,
        order=order,
        running_var=running_var,
        only=only,
        progress=progress,
    ).adapted()
