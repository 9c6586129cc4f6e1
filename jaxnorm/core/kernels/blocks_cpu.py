"""Walking through an array in blocks that the caches of the processor's cores hold together.

XLA gives each operation of a program a pass over memory of its own on CPUs, and writes out what
several share. In blocks, only the first pass reads from memory, and only a block is written out.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CACHE = 1 << 18
"""Bytes of one float32 array, for each core, that its cache holds beside a few others."""


def block_size(shape: Sequence[int]) -> int:
    """How many entries along the first axis make a block; all, if they are not many more."""
    entry = 4 * math.prod(shape[1:])
    block = max(1, CACHE * (os.cpu_count() or 1) // entry)
    return block if 2 * block <= shape[0] else shape[0]


def in_blocks(
    function: Callable[..., Any], arrays: Any, *shared: Any, summed: Any, block: int
) -> Any:
    """`function(arrays, *shared)`, computed block by block along the first axis of `arrays`.

    Args:
        function: gives a pytree of arrays: some with an entry for each of `arrays`, and some
            that are sums over entries.
        arrays: pytree of arrays that have their first axis in common.
        shared: further arguments.
        summed: pytree like the result, True for sums.
        block: entries in a block.
    """
    size = jax.tree.leaves(arrays)[0].shape[0]
    if block >= size:
        return function(arrays, *shared)
    stored = jax.tree.map(_bits, arrays)

    def of(start: Any, length: int) -> Any:
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, length), stored)
        result = function(jax.tree.map(_numbers, part, arrays), *shared)
        return jax.tree.map(lambda one, is_sum: one if is_sum else _bits(one), result, summed)

    def put(found: Any, start: Any, length: int) -> Any:
        def one(found, part, is_sum):
            if is_sum:
                return found + part
            return lax.dynamic_update_slice_in_dim(found, part, start, 0)

        return jax.tree.map(one, found, of(start, length), summed)

    def begin(like, is_sum):
        if is_sum:
            return jnp.zeros_like(like)
        return lax.empty((size, *like.shape[1:]), like.dtype)

    found = jax.tree.map(begin, jax.eval_shape(lambda: of(0, block)), summed)
    found = lax.fori_loop(0, size // block, lambda i, found: put(found, i * block, block), found)
    if size % block:
        found = put(found, size - size % block, size % block)
    types = jax.eval_shape(function, arrays, *shared)
    return jax.tree.map(_numbers, found, types)


def _bits(value: jax.Array) -> jax.Array:
    """Narrow numbers as integers: XLA would widen arrays of them as a whole, to slice them."""
    narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize == 2
    return lax.bitcast_convert_type(value, jnp.uint16) if narrow else value


def _numbers(bits: jax.Array, like: Any) -> jax.Array:
    return bits if bits.dtype == like.dtype else lax.bitcast_convert_type(bits, like.dtype)
