"""Mistakes with replicas and with mapped axes of layers. Part of the table of `test_errors.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from mistakes import LAYERS, Row, rows

import jaxnorm
from jaxnorm.core.replicas import pool_stats
from jaxnorm.tools import merge_replicas

STATS = jaxnorm.Stats(jnp.zeros((2, 3)), jnp.ones((2, 3)))
NORM = {"mean": jnp.zeros((2, 3)), "var": jnp.ones((2, 3))}


def stats_and(**others):
    return {"block": {"norm": NORM | others}}


def mapped(call, size):
    """A call inside `jax.vmap` with this axis name and size."""
    return lambda: jax.vmap(lambda _: call(), axis_name="a")(jnp.arange(size))


def endless():
    """A tree of statistics that contains itself."""
    tree = stats_and()
    tree["block"]["again"] = tree
    return tree


ROWS = [
    # The pure function
    Row(
        "pooled estimates that are evidence",
        lambda: pool_stats(jaxnorm.moments(jnp.ones((2, 3)), 1), 0),
        TypeError,
        r"^pool_stats: needs jaxnorm\.Stats or jaxnorm\.JointStats, found Moments.*jaxnorm\.pool\(",
    ),
    *(
        Row(
            f"pooled estimates that do not fit, {kind}",
            trigger,
            ValueError,
            rf"^pool_stats: {says}",
        )
        for kind, trigger, says in (
            (
                "variance",
                lambda: pool_stats(jaxnorm.Stats(jnp.zeros((2, 3)), jnp.ones(3)), 0),
                r"a mean of shape \(2, 3\) and a variance of shape \(3,\).*jnp\.stack",
            ),
            (
                "covariance",
                lambda: pool_stats(jaxnorm.JointStats(jnp.zeros((2, 3)), jnp.ones((2, 3, 2))), 0),
                r"a mean of shape \(2, 3\) and a covariance of shape \(2, 3, 2\)",
            ),
        )
    ),
    Row(
        "axis of replicas out of range",
        lambda: pool_stats(STATS, 2),
        ValueError,
        r"^pool_stats: axes=2.*2 axes.*from -2 to 1",
    ),
    *(
        Row(f"weights that are {kind}", lambda w=w: pool_stats(STATS, 0, weights=w), error, says)
        for kind, w, error, says in (
            ("booleans", [True, False], TypeError, r"^pool_stats: the weights are bool.*astype"),
            ("complex", [1j, 1], TypeError, r"^pool_stats: the weights are complex64"),
            ("text", "a", TypeError, r"^pool_stats: the weights are 'a', but say.*astype"),
            (
                "too many",
                [1, 2, 3],
                ValueError,
                r"^pool_stats: weights of shape \(3,\).*\(2, 3\).*axes \(0,\).*of shape \(2,\)",
            ),
            ("negative", [1, -2], ValueError, r"^pool_stats: weights=\[1, -2\].*weights=None"),
            ("all zero", [0, 0], ValueError, r"^pool_stats: weights=\[0, 0\].*some above 0"),
            (
                "not numbers",
                np.array([1, np.nan]),
                ValueError,
                r"^pool_stats: weights=\[1\.0, nan\]",
            ),
        )
    ),
    # Whole models
    Row(
        "merge of an array",
        lambda: merge_replicas(jnp.zeros((2, 3))),
        TypeError,
        r"^merge_replicas: found \w*(Array|Tracer).*variables\['batch_stats'\].*nnx\.state\(",
    ),
    Row(
        "merge of variables of unknown kind",
        lambda: merge_replicas(stats_and(u=jnp.zeros((2, 1)), sigma=jnp.zeros(2))),
        ValueError,
        r"^merge_replicas: of 2 .*'block/norm/sigma', 'block/norm/u'.*take_first=\['sigma', 'u'\]",
    ),
    Row(
        "merge of a mean without its variance",
        lambda: merge_replicas({"norm": {"mean": jnp.zeros((2, 3))}}),
        ValueError,
        r"^merge_replicas: of 1 .*'norm/mean'",
    ),
    Row(
        "merge with weights of another number",
        lambda: merge_replicas(stats_and(), weights=[1, 2, 3]),
        ValueError,
        r"^merge_replicas, 'block/norm': weights of shape \(3,\)",
    ),
    Row(
        "merge of a tree that contains itself",
        lambda: merge_replicas([endless(), endless()]),
        ValueError,
        r"^merge_replicas: the tree\['block'\]\['again'\].*no end.*del tree\['block'\]\['again'\]",
    ),
    Row(
        "merge of no replicas",
        lambda: merge_replicas([]),
        ValueError,
        r"^merge_replicas: found a list of 0 trees",
    ),
    Row(
        "merge of a list on devices",
        mapped(lambda: merge_replicas([NORM, NORM], axis_name="a"), 2),
        ValueError,
        r"^merge_replicas: found a list of 2 trees and axis_name='a'",
    ),
    Row(
        "merge of different models",
        lambda: merge_replicas([NORM, {"mean": jnp.zeros((2, 3))}]),
        ValueError,
        r"^merge_replicas: replica 1 has .*\{'mean': \(2, 3\)\}.*replicas of one model",
    ),
    Row(
        "merge of one model that has no replicas",
        lambda: merge_replicas({"mean": jnp.zeros(3), "var": jnp.ones(3)}),
        ValueError,
        r"^merge_replicas: the first axis.*\{'mean': \(3,\).*jnp\.stack.*axis_name='batch'",
    ),
    Row(
        "merge of different numbers of replicas",
        lambda: merge_replicas(stats_and(step=jnp.zeros((), jnp.int32))),
        ValueError,
        r"^merge_replicas: the first axis.*'block/norm/step': \(\)",
    ),
    Row(
        "merge on devices that are not mapped",
        lambda: merge_replicas(stats_and(), axis_name="a"),
        NameError,
        r"^merge_replicas: axis_name='a' is not bound",
    ),
    Row(
        "names by letters",
        lambda: merge_replicas(stats_and(), take_first="u"),
        TypeError,
        r"^merge_replicas: take_first='u'.*take_first=\{'u'\}",
    ),
    Row(
        "names that no path has",
        lambda: merge_replicas(stats_and(), average={"other", "norm"}),
        ValueError,
        r"^merge_replicas: average names \['other'\].*\['block', 'mean', 'norm', 'var'\]",
    ),
    # Mapped axes of layers
    *rows(
        "unbound axis_name of a layer",
        NameError,
        r"axis_name='batch' is not bound.*axis_name=None.*unbound_axis='local'",
        at=LAYERS,
        options={"axis_name": "batch"},
    ),
    *rows(
        "unknown way with unbound axes",
        ValueError,
        r"unbound_axis='ignore' is unknown.*unbound_axis='error' or unbound_axis='local'",
        at=LAYERS,
        options={"unbound_axis": "ignore"},
    ),
    *rows(
        "groups along axes of which one is unbound",
        ValueError,
        r"axis_index_groups count.*\('batch', 'model'\).*only \('batch',\) are bound.*groups=None",
        at=LAYERS,
        options={
            "axis_name": ("batch", "model"),
            "axis_index_groups": [[0, 1], [2, 3]],
            "unbound_axis": "local",
        },
        mapped=True,
    ),
]
