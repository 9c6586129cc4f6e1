"""Every error of the library: its type, and that its message says who, what was found, and the fix.

One table of mistakes. Each is made inside `jax.eval_shape`, where there are no values: an error is
raised while tracing, from shapes, dtypes and options alone. The last test holds the table against
the source: a `raise` that no row reaches fails it.
"""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from batch_family_mistakes import ROWS as WITH_THE_BATCH_FAMILY
from diagnose_mistakes import ROWS as WITH_DIAGNOSE
from evidence_mistakes import ROWS as WITH_EVIDENCE
from flax import errors, nnx
from fold_mistakes import ROWS as WITH_FOLDING
from freeze_mistakes import ROWS as WITH_FREEZING
from ghost_mistakes import ROWS as WITH_GHOST_BATCHES
from import_frameworks_mistakes import ROWS as WITH_OTHER_IMPORTS
from import_mistakes import ROWS as WITH_IMPORTS
from kernel_mistakes import ROWS as WITH_KERNELS
from method_mistakes import MISTAKES_WITH_METHODS
from mistakes import DOORS, KEY, MISTAKES_AT_DOORS, SHAPE, Call, Row
from models_mistakes import ROWS as WITH_MODELS
from population_mistakes import ROWS as WITH_POPULATIONS
from replace_mistakes import ROWS as WITH_REPLACING
from replicas_mistakes import ROWS as WITH_REPLICAS
from report_mistakes import ROWS as WITH_REPORTS
from study_mistakes import ROWS as WITH_STUDIES
from tent_mistakes import ROWS as WITH_TENT
from weight_mistakes import ROWS as WITH_WEIGHTS
from whitening_mistakes import ROWS as WITH_WHITENING

import jaxnorm


def moments_of(*shape):
    return jaxnorm.moments(jnp.ones((2, *shape)), axes=0)


def stats_of(*shape):
    return jaxnorm.Stats(jnp.zeros(shape), jnp.ones(shape))


X = jnp.zeros(SHAPE)

ROWS = [
    *MISTAKES_AT_DOORS,
    *MISTAKES_WITH_METHODS,
    *WITH_THE_BATCH_FAMILY,
    *WITH_DIAGNOSE,
    *WITH_EVIDENCE,
    *WITH_STUDIES,
    *WITH_TENT,
    *WITH_REPORTS,
    *WITH_REPLACING,
    *WITH_MODELS,
    *WITH_POPULATIONS,
    *WITH_IMPORTS,
    *WITH_OTHER_IMPORTS,
    *WITH_KERNELS,
    *WITH_FREEZING,
    *WITH_FOLDING,
    *WITH_GHOST_BATCHES,
    *WITH_REPLICAS,
    *WITH_WEIGHTS,
    *WITH_WHITENING,
    Row(
        "debiased average of a checkpoint without a count",
        lambda: jaxnorm.linen.BatchNorm(use_running_average=False, debias=True).apply(
            jaxnorm.linen.BatchNorm(use_running_average=False).init(KEY, X),
            X,
            mutable=["batch_stats"],
        ),
        ValueError,
        r"^BatchNorm: .*debias=True.*no 'updates'.*jnp\.full\(\(3,\), n, jnp\.float32\)",
    ),
    Row(
        "Linen layer that is no part of a model",
        lambda: jaxnorm.linen.BatchNorm().init(KEY, X),
        ValueError,
        r"^BatchNorm: .*use_running_average",
    ),
    Row(
        "second positional argument",
        lambda: jaxnorm.nnx.BatchNorm(3, nnx.Rngs(0)),
        TypeError,
        r"^BatchNorm: takes num_features as positional arguments, found 2.*rngs=rngs",
    ),
    Row(
        "statistics for other features",
        lambda: jaxnorm.batch_norm_inference(X, stats_of(2)),
        ValueError,
        r"^batch_norm_inference: .*mean has shape \(2,\).*\(4, 2, 3\).*shape \(3,\)",
    ),
    Row(
        "variance for other features",
        lambda: jaxnorm.standardize(X, jaxnorm.Stats(jnp.zeros(3), jnp.ones(2)), axes=(0, 1)),
        ValueError,
        r"^standardize: .*variance has shape \(2,\).*3 features along axis 2.*axes=\.\.\.",
    ),
    Row(
        "parameters along two axes",
        lambda: jaxnorm.affine(X, bias=jnp.ones(3), axis=(1, 2)),
        ValueError,
        r"^affine: .*bias has shape \(3,\).*\(2, 3\) features along axes \(1, 2\)",
    ),
    Row(
        "axes of moments out of range",
        lambda: jaxnorm.moments(X, axes=(0, -4)),
        ValueError,
        r"^moments: .*axes=-4.*3 axes.*from -3 to 2",
    ),
    Row(
        "axes of pooling out of range",
        lambda: jaxnorm.pool(moments_of(3), axes=1),
        ValueError,
        r"^pool: .*axes=1.*1 axes.*from -1 to 0",
    ),
    Row(
        "merge of nothing",
        lambda: jaxnorm.merge(),
        ValueError,
        r"^merge: .*found none.*jaxnorm\.moments\(x, axes\)",
    ),
    Row(
        "merge of different features",
        lambda: jaxnorm.merge(moments_of(3), moments_of(2)),
        ValueError,
        r"^merge: .*\(2,\), \(3,\).*jaxnorm\.moments\(x, axes\)",
    ),
    *(
        Row(
            f"{option} without a count of batches",
            lambda options=options: jaxnorm.update_running(stats_of(3), moments_of(3), **options),
            ValueError,
            rf"^update_running: .*{option}.*updates=jnp\.zeros\(\(3,\)\)",
        )
        for option, options in (
            ("debias=True", {"debias": True}),
            ("momentum=None", {"momentum": None}),
        )
    ),
    *(
        Row(
            f"evidence for {new} features where there are {old}",
            lambda old=old, new=new: jaxnorm.update_running(stats_of(old), moments_of(new)),
            ValueError,
            rf"^update_running: .*\({new},\).*\({old},\)",
        )
        for old, new in ((3, 2), (3, 1), (1, 3))
    ),
    *(
        Row(f"estimate for evidence, {who}", trigger, TypeError, rf"^{who}: needs jaxnorm\.{says}")
        for who, trigger, says in (
            (
                "merge",
                lambda: jaxnorm.merge(stats_of(3)),
                r"Moments, found Stats.*moments\(x, axes",
            ),
            ("pool", lambda: jaxnorm.pool(stats_of(3), 0), r"Moments, found Stats"),
            (
                "update_running",
                lambda: jaxnorm.update_running(stats_of(3), stats_of(3)),
                r"Moments, found Stats.*jaxnorm\.moments\(x, axes\)",
            ),
            (
                "batch_norm_inference",
                lambda: jaxnorm.batch_norm_inference(X, moments_of(3)),
                r"Stats, found Moments.*moments\.stats\(\)",
            ),
            (
                "standardize",
                lambda: jaxnorm.standardize(X, (jnp.zeros(3), jnp.ones(3)), axes=(0, 1)),
                r"Stats, found tuple",
            ),
            ("bessel", lambda: jaxnorm.bessel(moments_of(3), 4), r"Stats, found Moments"),
            ("ema", lambda: jaxnorm.ema(stats_of(3), moments_of(3), 0.9), r"Stats, found Moments"),
        )
    ),
    Row(
        "average of estimates of different shapes",
        lambda: jaxnorm.ema(stats_of(3), stats_of(4, 3), 0.9),
        ValueError,
        r"^ema: an estimate of shape \(4, 3\).*\(3,\)",
    ),
    Row(
        "count of updates of another shape",
        lambda: jaxnorm.update_running(stats_of(3), moments_of(3), updates=jnp.int32(0)),
        ValueError,
        r"^update_running: a count of updates of shape \(\).*\(3,\).*jnp\.zeros\(features\)",
    ),
    Row(
        "debiased average that never moves",
        lambda: jaxnorm.debiased_ema(stats_of(3), stats_of(3), 1.0, 0),
        ValueError,
        r"^debiased_ema: momentum=1.*momentum=None",
    ),
    *(
        Row(
            f"epsilon that is {kind}",
            lambda epsilon=epsilon: jaxnorm.batch_norm(X, epsilon=epsilon),
            TypeError,
            r"^batch_norm: epsilon=.*known when.*epsilon=1e-5",
        )
        for kind, epsilon in (("none", None), ("text", "small"))
    ),
    Row(
        "epsilon that is traced",
        lambda: jax.vmap(lambda e: jaxnorm.batch_norm(X, epsilon=e)[0])(jnp.ones(2)),
        TypeError,
        r"^batch_norm: epsilon=.*known when.*traced",
    ),
    Row(
        "negative epsilon of the backward pass",
        lambda: jaxnorm.batch_norm_backward(X, X, epsilon=-1.0),
        ValueError,
        r"^batch_norm_backward: epsilon=-1.0.*0 or more",
    ),
    Row(
        "eight bits",
        lambda: jaxnorm.batch_norm(X.astype(jnp.float8_e4m3fn)),
        TypeError,
        r"^batch_norm: .*float8_e4m3fn.*x\.astype\(jnp\.bfloat16\)",
    ),
    Row(
        "scale of eight bits",
        lambda: jaxnorm.layer_norm(X, jnp.ones(3, jnp.float8_e4m3fn)),
        TypeError,
        r"^layer_norm: scale is float8_e4m3fn\[3\].*scale\.astype\(jnp\.float32\)",
    ),
    Row(
        "evidence in integers",
        lambda: jaxnorm.merge(jax.tree.map(lambda leaf: leaf.astype(int), moments_of(3))),
        TypeError,
        r"^merge: the variance is int32\[3\].*x\.astype\(jnp\.float32\)",
    ),
    *(
        Row(
            f"{name} of {dtype}",
            lambda call=call, dtype=dtype: call(
                jax.tree.map(lambda leaf: leaf.astype(dtype), stats_of(3))
            ),
            TypeError,
            rf"^{name}: the running mean is {dtype}.*mean\.astype\(jnp\.float32\)",
        )
        for dtype in ("bfloat16", "float8_e4m3fn", "int32")
        for name, call in {
            "ema": lambda old: jaxnorm.ema(old, stats_of(3), 0.9),
            "debiased_ema": lambda old: jaxnorm.debiased_ema(old, stats_of(3), 0.9, 0),
            "cumulative_average": lambda old: jaxnorm.cumulative_average(old, stats_of(3), 0),
            "bessel": lambda old: jaxnorm.bessel(old, 4),
            "update_running": lambda old: jaxnorm.update_running(old, moments_of(3)),
            "update_renorm": lambda old: jaxnorm.update_renorm(old, moments_of(3)),
        }.items()
    ),
    Row(
        "momentum of a function above 1",
        lambda: jaxnorm.update_running(stats_of(3), moments_of(3), momentum=2),
        ValueError,
        r"^update_running: .*momentum=2.*from 0 to 1.*momentum=0\.99",
    ),
    Row(
        "backward pass with another shape",
        lambda: jaxnorm.batch_norm_backward(X[0], X),
        ValueError,
        r"^batch_norm_backward: .*dy has shape \(2, 3\).*x has shape \(4, 2, 3\)",
    ),
    Row(
        "backward pass of complex numbers",
        lambda: jaxnorm.batch_norm_backward_steps(X + 0j, X + 0j),
        TypeError,
        r"^batch_norm_backward_steps: .*complex64.*jax\.vjp",
    ),
    Row(
        "unknown name", lambda: jaxnorm.batchnorm, AttributeError, r"^module 'jaxnorm'.*'batchnorm'"
    ),
]


def raised(row: Row) -> Exception:
    """The error of a mistake, made where there are no values unless the row says so."""
    make = row.trigger if row.with_values else lambda: jax.eval_shape(row.trigger)
    with pytest.raises(row.error) as caught:
        make()
    return caught.value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_message_says_who_what_and_the_fix(row):
    message = str(raised(row))
    assert re.search(row.says, message), message
    assert message.isprintable()


def test_flax_code_can_catch_immutable_statistics():
    assert issubclass(jaxnorm.linen.StatsNotMutableError, errors.ModifyScopeVariableError)


def test_correct_calls_raise_nothing():
    """The doors themselves make no mistake."""
    for door in DOORS:
        jax.eval_shape(lambda door=door: door.call(Call()))
        jax.eval_shape(lambda door=door: door.call(Call(mask=((4, 1, 1), bool))))


def test_every_error_of_the_library_is_in_the_table():
    home = pathlib.Path(jaxnorm.__file__).parent
    reached = set()
    for row in ROWS:
        frame = raised(row).__traceback__
        while frame is not None:
            reached.add((frame.tb_frame.f_code.co_filename, frame.tb_lineno))
            frame = frame.tb_next
    for file in home.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                assert any((str(file), line) in reached for line in lines), f"{file}:{node.lineno}"
