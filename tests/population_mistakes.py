"""Mistakes with statistics of data sets. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mistakes import Row

import jaxnorm
from jaxnorm.tools.statistics.adapt import adapt_stats, batch_adapter
from jaxnorm.tools.statistics.population import population_stats

NORM = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
X = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)


def concretely(call):
    """A call that needs values, where there are none."""

    def run():
        with jax.ensure_compile_time_eval():
            call()

    return run


def population(batches=(X,), model=NORM, **options):
    return concretely(lambda: population_stats(model, batches, **options))


def adapted(batches=(X,), **options):
    return concretely(lambda: adapt_stats(NORM, batches, **options))


def of_its_own_output(norm, x):
    """A norm that is called again, on a multiple of what it returned."""
    return norm(100 * norm(x))


@concretely
def once_only():
    """The function of batches gives the same iterator again."""
    batches = iter([X, X])
    population_stats(NORM, lambda: batches, order="layer by layer")


ROWS = [
    Row(
        "statistics of a model without norms",
        population(model=nnx.LayerNorm(2, rngs=nnx.Rngs(0))),
        ValueError,
        r"^population_stats: the call reaches no norm with stored statistics.*call=",
    ),
    Row(
        "unknown order",
        population(order="sequential"),
        ValueError,
        r"^population_stats: order='sequential' is unknown.*order='layer by layer'",
    ),
    Row(
        "unknown variance",
        population(running_var="sample"),
        ValueError,
        r"^population_stats: running_var='sample' is unknown.*running_var='unbiased', or None",
    ),
    *(
        Row(
            f"batches that are {kind}",
            population(batches),
            TypeError,
            rf"^population_stats: the batches are {type(batches).__name__}.*iterable.*\[batch\]",
        )
        for kind, batches in (("one array", X), ("one batch", {"x": X}), ("a number", 3))
    ),
    *(
        Row(
            f"batches of {kind}",
            concretely(lambda tool=tool, batch=batch: tool(NORM, batch)),
            error,
            rf"^{tool.__name__}: model\({shown}\) raised .*\. Say how.*call=lambda model, batch: "
            rf"{fix}",
        )
        for kind, tool, batch, error, shown, fix in (
            (
                "inputs and labels",
                population_stats,
                [(X, np.arange(2))],
                (TypeError, ValueError),
                r"\(float32\[2, 2\], int64\[2\]\)",
                r"model\(batch\[0\]\)",
            ),
            (
                "arrays by name",
                adapt_stats,
                [{"image": X}],
                (TypeError, ValueError),
                r"\{image: float32\[2, 2\]\}",
                r"model\(batch\['image'\]\)",
            ),
            (
                "other features",
                batch_adapter,
                np.ones((3, 5), np.float32),
                (TypeError, ValueError),
                r"float32\[3, 5\]",
                r"model\(batch, train=False\)",
            ),
        )
    ),
    Row(
        "adapter of a model that returns text",
        concretely(lambda: batch_adapter(NORM, X, call=lambda model, x: (model(x), "logits"))(X)),
        TypeError,
        r"^batch_adapter: the call returns str.*call=lambda model, batch: model\(batch\)\['log",
    ),
    Row(
        "several passes over an iterator",
        population(iter([X]), order="layer by layer"),
        TypeError,
        r"^population_stats: the batches are list_iterator.*once.*batches=lambda: load\(\)",
    ),
    Row(
        "no batches",
        adapted([]),
        ValueError,
        r"^adapt_stats: in pass 1 there are no batches.*Give one or more",
    ),
    Row(
        "a function that gives one iterator only",
        once_only,
        ValueError,
        r"^population_stats: in pass 2 there are no batches.*new iterable",
    ),
    Row(
        "batches of text",
        population(["a"], call=lambda model, batch: model(X)),
        TypeError,
        r"^population_stats: a batch holds str.*batches=map\(convert, batches\)",
    ),
    Row(
        "statistics of a data set while tracing",
        lambda: population_stats(NORM, [jnp.zeros((3, 2))]),
        TypeError,
        r"^population_stats: works on values.*cannot be traced.*outside of jax\.jit",
    ),
    Row(
        "nothing valid",
        population(
            model=jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
            call=lambda model, x: model(x, mask=np.zeros((2, 1), bool)),
        ),
        ValueError,
        r"^population_stats: in all batches, nothing valid reached ''.*only=lambda path: path not",
    ),
    Row(
        "batches with NaN",
        population([np.full((2, 2), np.nan, np.float32)]),
        ValueError,
        r"^population_stats: NaN or infinite statistics in ''.*the batches and in the weights",
    ),
    Row(
        "a norm of what depends on its own output",
        population(call=of_its_own_output, order="layer by layer"),
        ValueError,
        r"^population_stats: after 12 passes.*'' still move.*own output\. Use order='together'",
    ),
    *(
        Row(
            f"prior strength that is {kind}",
            adapted(prior_strength=strength),
            error,
            rf"^adapt_stats: prior_strength={strength!r} must be a number from 0.*prior_strength=0",
        )
        for kind, strength, error in (
            ("text", "1", TypeError),
            ("none", None, TypeError),
            ("negative", -1, ValueError),
            ("no number", float("nan"), ValueError),
        )
    ),
    *(
        Row(
            f"examples of {kind}",
            adapted([batch], prior_strength=1, call=lambda model, batch: model(X)),
            ValueError,
            r"^adapt_stats: the arrays of a batch have the shapes.*examples=lambda batch: len\(",
        )
        for kind, batch in (("different numbers", (X, X[:1])), ("no number", np.float32(0)))
    ),
]
