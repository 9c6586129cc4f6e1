"""The running statistics of a whole model, merged over replicas that ran apart.

Each replica normalized by its own batches and kept its own running statistics; what is saved, or
used in inference, is one model. An average of the variances, as by `jax.lax.pmean`, forgets how far
the replicas' means lie apart. Here they are pooled: see `jaxnorm.pool_stats`.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core.covariance import Comoments, JointStats, pool_comoments
from jaxnorm.core.devices import AxisName, axis_names, check_bound
from jaxnorm.core.moments import Moments, Stats, pool
from jaxnorm.core.replicas import pool_stats
from jaxnorm.tools.adapter.cycles import check_no_cycle

_ROLE_AND_DOMAIN = re.compile(
    "((?:pending_)?(?:mean|var|cov)|pending_count|pending_batches|updates|step)(_.*)?"
)
"""The name of a norm's variable: what it is and, with `AdaBN`, of which domain."""

_COUNTS = ("updates", "step", "pending_batches")
"""The roles of variables of which replicas have the largest."""

Path = tuple[str, ...]


class _Replicas(NamedTuple):
    """Where the replicas of an array lie: along its first axis, or along mapped axes."""

    names: tuple[str, ...] | None

    @property
    def options(self) -> dict[str, Any]:
        """The same for the functions that pool."""
        return dict(axes=0) if self.names is None else dict(axis_name=self.names)

    def largest(self, leaf: jax.Array) -> jax.Array:
        return leaf.max(0) if self.names is None else lax.pmax(leaf, self.names)

    def average(self, leaf: jax.Array) -> jax.Array:
        return leaf.mean(0) if self.names is None else lax.pmean(leaf, self.names)

    def first(self, leaf: jax.Array) -> jax.Array:
        if self.names is None:
            return leaf[0]
        is_first = lax.axis_index(self.names) == 0
        return lax.psum(jnp.where(is_first, leaf, jnp.zeros_like(leaf)), self.names)

    def shape(self, leaf: jax.Array) -> tuple[int, ...]:
        """That of one replica."""
        return leaf.shape[1:] if self.names is None else leaf.shape

    def like_each(self, merged: jax.Array) -> jax.Array:
        """What was merged, laid along what it was merged from."""
        return jnp.expand_dims(merged, 0) if self.names is None else merged


def merge_replicas(
    batch_stats: Any,
    *,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    take_first: Collection[str] = (),
    average: Collection[str] = (),
) -> Any:
    """Merges the running statistics of a model's replicas, with the spread of their means.

        mean = sum w_i mean_i / sum w_i,   var = sum w_i (var_i + |mean_i - mean|^2) / sum w_i

    for each norm of the model, and likewise its covariance. Instead of `jax.lax.pmean` in

        jax.pmap(lambda stats: merge_replicas(stats, axis_name="batch"), "batch")(batch_stats)

    Args:
        batch_stats: the collection `batch_stats` of a Linen model (nested dictionaries, also
            frozen), or `nnx.state(model, nnx.BatchStat)`, also as a pure dictionary. All arrays
            have the replicas along their first axis, as `jax.pmap` leaves them; or it is a list of
            such trees, one for each replica; or, with `axis_name`, the tree of this replica.
        weights: how much each replica weighs, one number for each, or with `axis_name` the number
            of this one. None for their `updates`, where a norm counts them (with `debias` or
            `momentum=None`), so that a replica that saw nothing weighs nothing; elsewhere all weigh
            alike.
        axis_name: name or names of mapped axes (`jax.pmap`, `jax.shard_map`, `jax.vmap`) along
            which the replicas lie.
        take_first: parts of the paths of variables that are taken from the first replica, such as
            `{"u", "sigma"}` of spectral norms, which depend on weights and not on data.
        average: parts of the paths of variables that are averaged without the spread of their
            means: the names of instance norms with running statistics, whose variance is that
            within an instance.

    Returns:
        The tree of one model, of the kind, structure and dtypes of the replicas'. Counts of steps,
        `updates` and `step`, are the largest of all replicas': training goes on where the furthest
        was, as one model or again as replicas, and merging equal replicas changes nothing. Evidence
        that waits for a step (`update_every`) is pooled by its counts.

    Raises:
        TypeError: a tree that is no mapping; statistics or weights that are no numbers.
        ValueError: variables of which it is not known how they merge, all named with their paths;
            replicas of different structure or shape, or none; weights that do not fit; names that
            no path has.
        NameError: `axis_name` is not bound.

    Numerics:
        Computes in float32 or wider, right at means of many standard deviations; under `jax.jit` as
        well.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm.tools import merge_replicas
        >>> mean, var = jnp.array([[0.0], [4.0]]), jnp.ones((2, 1))
        >>> merged = merge_replicas({"BatchNorm_0": {"mean": mean, "var": var}})
        >>> merged["BatchNorm_0"]["mean"].tolist(), merged["BatchNorm_0"]["var"].tolist()
        ([2.0], [5.0])

    Source:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for the merge
        of two parts.

    Differs:
        From Flax's examples, which average variances, `step` and all else alike.
    """
    who = "merge_replicas"
    replicas = _Replicas(None if axis_name is None else axis_names(axis_name))
    check_bound(replicas.names or (), who)
    tree = _tree(batch_stats, axis_name, who)
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [_path(path) for path, _ in found]
    leaves = [jnp.asarray(leaf) for _, leaf in found]
    _check_names({"take_first": take_first, "average": average}, paths, who)
    if replicas.names is None:
        _check_first_axis(paths, leaves, who)

    merged: dict[int, jax.Array] = {}
    norms: dict[tuple[Path, str], dict[str, int]] = {}
    unknown: list[Path] = []
    for i, path in enumerate(paths):
        role_and_domain = _ROLE_AND_DOMAIN.fullmatch(path[-1])
        if set(path) & set(take_first):
            merged[i] = replicas.first(leaves[i])
        elif set(path) & set(average):
            counts = role_and_domain is not None and role_and_domain[1] in _COUNTS
            merged[i] = replicas.largest(leaves[i]) if counts else replicas.average(leaves[i])
        elif role_and_domain is None:
            unknown.append(path)
        else:
            role, domain = role_and_domain.groups(default="")
            norms.setdefault((path[:-1], domain), {})[role] = i
    for (path, _), places in norms.items():
        values = {role: leaves[i] for role, i in places.items()}
        if _is_norm(values):
            name = f"{who}, '{'/'.join(path)}'" if path else who
            pooled = _merged_norm(values, weights, replicas, name)
            merged |= {i: pooled[role] for role, i in places.items()}
        else:
            unknown += [paths[i] for i in places.values()]
    if unknown:
        listed = ", ".join(repr("/".join(path)) for path in sorted(unknown))
        raise ValueError(
            f"{who}: of {len(unknown)} variables it is not known how replicas merge: {listed}. "
            f"Where all replicas hold the same, take the first's: "
            f"take_first={sorted({path[-1] for path in unknown})}."
        )
    return structure.unflatten(
        merged[i].reshape(replicas.shape(leaf)).astype(leaf.dtype) for i, leaf in enumerate(leaves)
    )


def _is_norm(values: Mapping[str, jax.Array]) -> bool:
    """Whether these are the variables of one norm, by names and shapes."""
    spread = "cov" if "cov" in values else "var"
    stats = {"mean", spread}
    pending = {"pending_batches", "pending_count", "pending_mean", f"pending_{spread}"}
    others = values.keys() - stats - {"updates", "step"}
    if not (stats <= values.keys() and others in (set(), pending)):
        return False
    if "cov" in values:
        return values["mean"].size == math.prod(values["cov"].shape[:-1])
    return values["mean"].shape == values["var"].shape


def _merged_norm(
    values: Mapping[str, jax.Array], weights: ArrayLike | None, replicas: _Replicas, who: str
) -> dict[str, jax.Array]:
    """The variables of one norm, of all replicas together."""
    merged = {role: replicas.largest(values[role]) for role in _COUNTS if role in values}
    if weights is None and "updates" in values:
        # Where no replica saw anything all still hold what they started with.
        untouched = replicas.like_each(merged["updates"] == 0)
        weights = jnp.where(untouched, jnp.ones_like(values["updates"]), values["updates"])

    if "cov" in values:
        mean, cov = _grouped(values["mean"], values["cov"]), values["cov"]
        stats = pool_stats(JointStats(mean, cov), weights=weights, who=who, **replicas.options)
    else:
        stats = Stats(values["mean"], values["var"])
        stats = pool_stats(stats, weights=weights, who=who, **replicas.options)
    merged |= vars(stats)
    if "pending_count" in values:
        # Where nothing waits, what stands beside the count 0 is merged as if it were of one value.
        nothing = replicas.largest(values["pending_count"]) == 0
        count, mean = values["pending_count"], values["pending_mean"]
        count = jnp.where(replicas.like_each(nothing), jnp.ones_like(count), count)
        if "cov" in values:
            cov = values["pending_cov"]
            evidence = pool_comoments(
                Comoments(count, _grouped(mean, cov), cov), **replicas.options
            )
        else:
            evidence = pool(Moments(count, mean, values["pending_var"]), **replicas.options)
        counted = jnp.where(nothing, jnp.zeros_like(evidence.count), evidence.count)
        evidence = dataclasses.replace(evidence, count=counted)
        merged |= {f"pending_{name}": leaf for name, leaf in vars(evidence).items()}
    return merged


def _grouped(mean: jax.Array, cov: jax.Array) -> jax.Array:
    """The mean of features as that of groups of features, as the covariance has them."""
    return mean.reshape(cov.shape[:-1])


def _tree(batch_stats: Any, axis_name: AxisName | None, who: str) -> Any:
    """One tree, into which a list of trees is stacked.

    Raises:
        TypeError: it is no mapping.
        ValueError: the list is empty, or stands beside an axis name; or trees differ, or contain
            themselves.
    """
    several = isinstance(batch_stats, Sequence) and not isinstance(batch_stats, str)
    trees = list(batch_stats) if several else [batch_stats]
    for tree in trees:
        if not isinstance(tree, Mapping):
            raise TypeError(
                f"{who}: found {type(tree).__name__}, but needs the variables of a model by name. "
                f"Use variables['batch_stats'] in Linen, nnx.state(model, nnx.BatchStat) in NNX."
            )
        check_no_cycle(tree, who)
    if not several:
        return batch_stats
    if not trees or axis_name is not None:
        raise ValueError(
            f"{who}: found a list of {len(trees)} trees and axis_name={axis_name!r}. Give a list "
            f"of one tree or more and axis_name=None, or this replica's tree and axis_name."
        )
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
    for i, shape in enumerate(shapes):
        if jax.tree.structure(trees[i]) != jax.tree.structure(trees[0]) or shape != shapes[0]:
            raise ValueError(
                f"{who}: replica {i} has variables of shapes {shape}, replica 0 {shapes[0]}. Merge "
                f"replicas of one model."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _path(keys: Sequence[Any]) -> Path:
    """The names on the way to a variable; weight norms put several into one key."""
    parts: list[str] = []
    for key in keys:
        if isinstance(key, jax.tree_util.GetAttrKey):
            break  # the value inside a box or an NNX variable
        inner = key.key if isinstance(key, jax.tree_util.DictKey) else key
        for part in inner if isinstance(inner, tuple) else str(inner).split("/"):
            parts.append(str(part))
    return tuple(parts)


def _check_names(given: Mapping[str, Collection[str]], paths: Sequence[Path], who: str) -> None:
    """Raises for names that are text by letters, or that no path has."""
    known = {part for path in paths for part in path}
    for option, names in given.items():
        if isinstance(names, str):
            raise TypeError(
                f"{who}: {option}={names!r} would be read letter by letter. Use "
                f"{option}={{{names!r}}}."
            )
        if missing := sorted(set(names) - known):
            raise ValueError(
                f"{who}: {option} names {missing}, which no path has. The paths are made of "
                f"{sorted(known)}."
            )


def _check_first_axis(paths: Sequence[Path], leaves: Sequence[jax.Array], who: str) -> None:
    """Raises unless the first axis of all arrays is that of replicas, as far as can be seen."""
    shapes = {"/".join(path): leaf.shape for path, leaf in zip(paths, leaves, strict=True)}
    sizes = {shape[:1] for shape in shapes.values()}
    alone = [
        path
        for path, shape in shapes.items()
        if len(shape) < 2 and re.search("(mean|var)$", path.split("/")[-1])
    ]
    if len(sizes) > 1 or sizes & {(), (0,)} or alone:
        raise ValueError(
            f"{who}: the first axis must be that of replicas, and statistics need another for "
            f"features, found {shapes}. Stack the replicas, jax.tree.map(lambda *leaves: "
            f"jnp.stack(leaves), *trees), or inside jax.pmap name the axis: axis_name='batch'."
        )
