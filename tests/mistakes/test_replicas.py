"""Mistakes with the statistics of replicas."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm
from jaxnorm import pool_stats
from jaxnorm.tools import merge_replicas
from mistakes import name_error, type_error, value_error, while_tracing
from mistakes.layers import ones, zeros

MEAN = zeros(2, 3)
NORM = {"mean": MEAN, "var": MEAN}


def stats_and(**others):
    return {"block": {"norm": NORM | others}}


def endless():
    """A tree of statistics that contains itself."""
    tree = stats_and()
    tree["block"]["again"] = tree
    return tree


@while_tracing
def test_pooled_estimates():
    with type_error("pool_stats: needs … Stats … JointStats, found Moments … jaxnorm.pool("):
        pool_stats(jaxnorm.moments(MEAN, 1), 0)
    with value_error("pool_stats: a mean of shape (2, 3) and a variance of shape (3,) … jnp.stack"):
        pool_stats(jaxnorm.Stats(MEAN, MEAN[0]), 0)
    with value_error("pool_stats: a mean of shape (2, 3) and a covariance of shape (2, 3, 2)"):
        pool_stats(jaxnorm.JointStats(MEAN, ones(2, 3, 2)), 0)
    with value_error("pool_stats: axes=2 … 2 axes … from -2 to 1"):
        pool_stats(jaxnorm.Stats(MEAN, MEAN), 2)


@while_tracing
def test_weights():
    def weighted(weights):
        pool_stats(jaxnorm.Stats(MEAN, MEAN), 0, weights=weights)

    with type_error("pool_stats: the weights are bool … astype"):
        weighted([True, False])
    with type_error("pool_stats: the weights are complex64"):
        weighted([1j, 1])
    with type_error("pool_stats: the weights are 'a', but say … astype"):
        weighted("a")
    with value_error("pool_stats: weights of shape (3,) … (2, 3) … axes (0,) … of shape (2,)"):
        weighted([1, 2, 3])
    with value_error("pool_stats: weights=[1, -2] … weights=None"):
        weighted([1, -2])
    with value_error("pool_stats: weights=[0, 0] … some above 0"):
        weighted([0, 0])
    with value_error("pool_stats: weights=[1.0, nan]"):
        weighted(np.array([1, np.nan]))
    with value_error("merge_replicas, 'block/norm': weights of shape (3,)"):
        merge_replicas(stats_and(), weights=[1, 2, 3])


@while_tracing
def test_trees():
    with type_error("merge_replicas: found … Tracer … variables['batch_stats'] … nnx.state("):
        merge_replicas(jnp.zeros((2, 3)))
    with value_error("merge_replicas: of 2 … /sigma', 'block/norm/u' … take_first=['sigma', 'u']"):
        merge_replicas(stats_and(u=MEAN[:, :1], sigma=MEAN[:, 0]))
    with value_error("merge_replicas: of 1 … 'norm/mean'"):
        merge_replicas({"norm": {"mean": MEAN}})
    with value_error("merge_replicas: the tree['block']['again'] … del tree['block']['again']"):
        merge_replicas([endless(), endless()])
    with type_error("merge_replicas: take_first='u' … take_first={'u'}"):
        merge_replicas(stats_and(), take_first="u")
    with value_error("merge_replicas: average names ['other'] … ['block', 'mean', 'norm', 'var']"):
        merge_replicas(stats_and(), average={"other", "norm"})

    # Numbers of replicas.
    with value_error("merge_replicas: found a list of 0 trees"):
        merge_replicas([])
    with value_error("merge_replicas: found a list of 2 trees and axis_name='a'"):
        jax.vmap(lambda _: merge_replicas([NORM, NORM], axis_name="a"), axis_name="a")(
            jnp.arange(2)
        )
    with value_error("merge_replicas: replica 1 has … {'mean': (2, 3)} … replicas of one model"):
        merge_replicas([NORM, {"mean": MEAN}])
    with value_error("merge_replicas: … {'mean': (3,) … jnp.stack … axis_name='batch'"):
        merge_replicas({"mean": MEAN[0], "var": MEAN[0]})
    with value_error("merge_replicas: the first axis … 'block/norm/step': ()"):
        merge_replicas(stats_and(step=np.int32(0)))
    with name_error("merge_replicas: axis_name='a' is not bound"):
        merge_replicas(stats_and(), axis_name="a")
