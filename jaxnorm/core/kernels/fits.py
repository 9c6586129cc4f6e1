"""Which arrays the TPU kernels serve, and how much of one they hold at a time.

A kernel runs over blocks of its arrays. While it works on one block in the fast memory next to the
arithmetic units (VMEM), the next is being read and the last written: each array has two blocks
there. Larger blocks keep the memory busier, up to about a mebibyte; what they may take together is
bounded by the chip.
"""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike

MEBIBYTE = 1 << 20
VMEM = 16 * MEBIBYTE
"""What a kernel has on every chip without asking for more."""

LARGEST_VMEM = 48 * MEBIBYTE
"""What a kernel may ask for: chips from v5 on have 64 MiB and more."""

TEMPORARIES = 6
"""How many float32 arrays a kernel computes with at a time, all of the size of a piece."""

BLOCK = MEBIBYTE
"""Bytes of one array from which larger blocks are no faster."""

PIECE = 1 << 17
"""How many numbers are worked on at a time: enough to hide how long a sum along lanes takes."""

LANES, SUBLANES = 128, 16
"""Numbers beside and above each other in one register, the latter of 16 bits."""

PARTIAL_SUMS = 8
"""Sums over rows are kept as a whole register of float32, and added up at the end."""


def rows_block(rows: int, features: int, *dtypes: DTypeLike) -> int:
    """How many rows a kernel holds of each of several arrays; 0 if not even a few fit.

    A power of two, because the statistics of that many rows lie in whole registers.
    """
    row = _padded(features, LANES)
    itemsizes = [jnp.dtype(dtype).itemsize for dtype in dtypes]
    bound = min(
        max(0, VMEM - _rows_working_space(features)) // (2 * row * sum(itemsizes)),
        max(SUBLANES, BLOCK // (row * min(itemsizes))),
        _next_power_of_two(max(rows, SUBLANES)),
    )
    return 0 if bound < SUBLANES else 1 << (bound.bit_length() - 1)


def _rows_working_space(features: int) -> int:
    """Temporaries, and the sums over rows for two parameters, of which there are two blocks."""
    piece = max(PIECE, SUBLANES * _padded(features, LANES))
    return 4 * (TEMPORARIES * piece + 2 * 2 * PARTIAL_SUMS * _padded(features, LANES))


def slabs_block(shape: tuple[int, int, int], *dtypes: DTypeLike) -> int:
    """How many examples a kernel holds of each of several arrays; 0 if not even one fits."""
    examples, _, _ = shape
    if slabs_vmem(1, shape, *dtypes) > LARGEST_VMEM:
        return 0
    wanted = max(1, BLOCK // _slab_bytes(shape, dtypes[0]))
    each = 2 * _slab_bytes(shape, *dtypes)
    possible = max(1, (VMEM - _slabs_working_space(shape)) // each)
    return math.gcd(examples, 1 << (min(wanted, possible).bit_length() - 1))


def slabs_vmem(examples: int, shape: tuple[int, int, int], *dtypes: DTypeLike) -> int:
    """VMEM that a kernel needs for blocks of so many examples."""
    blocks = 2 * examples * _slab_bytes(shape, *dtypes)
    return max(VMEM, blocks + _slabs_working_space(shape))


def _slab_bytes(shape: tuple[int, int, int], *dtypes: DTypeLike) -> int:
    """VMEM that one example takes of each of several arrays of one shape."""
    _, positions, features = shape
    itemsizes = sum(jnp.dtype(dtype).itemsize for dtype in dtypes)
    return _padded(positions, SUBLANES) * _padded(features, LANES) * itemsizes


def _slabs_working_space(shape: tuple[int, int, int]) -> int:
    """Temporaries, and which feature is in which group: two blocks, and three parts of it."""
    features = _padded(shape[2], LANES)
    return 4 * (TEMPORARIES * max(PIECE, SUBLANES * features) + 5 * LANES * features)


def rows_fit(
    shape: tuple[int, int], dtype: DTypeLike, result: DTypeLike | None = None
) -> str | None:
    """Why the kernel for rows does not serve an array of `shape`; None if it does.

    `result` is the dtype of what is computed, if it is not that of the array.
    """
    rows, features = shape
    dtypes = dtype, result or dtype, dtype  # x, dy, dx
    if reason := _unfit(shape, *dtypes):
        return reason
    if rows_block(rows, features, *dtypes):
        return None
    row = _padded(features, LANES) * sum(jnp.dtype(one).itemsize for one in dtypes)
    return (
        f"{SUBLANES} rows of {features} features need "
        f"{_in_mebibytes(2 * SUBLANES * row + _rows_working_space(features))} of VMEM, more than "
        f"the {_in_mebibytes(VMEM)} that every chip has"
    )


def slabs_fit(
    shape: tuple[int, int, int], dtype: DTypeLike, result: DTypeLike | None = None
) -> str | None:
    """Why the kernel for slabs does not serve an array of `shape`; None if it does.

    `result` is the dtype of what is computed, if it is not that of the array.
    """
    dtypes = dtype, result or dtype, dtype  # x, dy, dx
    if reason := _unfit(shape, *dtypes):
        return reason
    if slabs_block(shape, *dtypes):
        return None
    return (
        f"one example's slab of {_in_mebibytes(_slab_bytes(shape, dtype))} needs "
        f"{_in_mebibytes(slabs_vmem(1, shape, *dtypes))} of VMEM, more than the "
        f"{_in_mebibytes(LARGEST_VMEM)} that a kernel may have"
    )


def _unfit(shape: tuple[int, ...], *dtypes: DTypeLike) -> str | None:
    for dtype in (jnp.dtype(one) for one in dtypes):
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{dtype.name} is neither bfloat16 nor float32"
    if 0 in shape:
        return f"the shape {tuple(shape)} holds nothing"
    return None


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _in_mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:.4g} MiB"
