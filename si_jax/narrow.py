"""Numbers in one byte or two, written so that sums of small terms do not stall.

A sum that is rounded to the nearest narrow number stands still once its terms are
smaller than half of the gap to the next. Rounded up or down by chance, in proportion
to what is nearer, it is right in expectation. The chance comes from a hash of the
numbers at hand: the same inputs give the same state, however they are sharded, and no
key is needed. So inputs that never change are rounded alike every time; gradients and
parameters in training do change.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

ROOT = jnp.dtype(jnp.float8_e5m2)  # holds √Ω: Ω from 2⁻³² to 2³¹, factors of 1.3 to 1.6
_HALF = jnp.dtype(jnp.bfloat16)


def read(x: jax.Array) -> jax.Array:
    """The number that ``x`` stands for: of a root its square, with its sign."""
    if getattr(x, "dtype", None) != ROOT:
        return x
    root = x.astype(jnp.float32)
    return root * jnp.abs(root)


def written(x: jax.Array, dtype: DTypeLike, *seeds: Any) -> jax.Array:
    """``x`` as a state of this dtype holds it; what is narrow, rounded by chance."""
    if dtype == _HALF and jnp.result_type(x) != _HALF:
        # The upper half of a float32 is a bfloat16: add to the lower, cut it off.
        bits = _bits(x) + (_hash(*seeds) >> 16)
        high = bits & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(high, jnp.float32).astype(_HALF)
    return _root(x, _hash(*seeds)) if dtype == ROOT else x.astype(dtype)


def converted(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A copy of what a state holds in one dtype for another that holds it in its own.

    To the nearest bfloat16: this happens once.
    """
    if jnp.result_type(x) == dtype or ROOT not in (jnp.result_type(x), dtype):
        return jnp.array(x, dtype)
    number = read(jnp.asarray(x))
    return written(number, dtype, number)


def _root(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The square root of one of the two nearest squares; beyond the last, the last."""
    size = jnp.minimum(jnp.abs(x.astype(jnp.float32)), float(jnp.finfo(ROOT).max) ** 2)
    # A little more, lest an inexact root of a square falls below it.
    root = jnp.sqrt(size) * 1.000001
    cut = _bits(root) & jnp.uint32(0xFFE00000)  # two bits after the leading one
    low = jax.lax.bitcast_convert_type(cut, jnp.float32)
    high = jax.lax.bitcast_convert_type(cut + jnp.uint32(1 << 21), jnp.float32)
    step, smallest = 2.0**-16, 2.0**-14  # below it the steps are all alike
    floor = jnp.floor(root / step) * step
    low = jnp.where(root < smallest, floor, low)
    high = jnp.where(root < smallest, floor + step, high)
    share = (size - low * low) / (high * high - low * low)
    up = (noise >> 8).astype(jnp.float32) * 2.0**-24 < share
    chosen = jnp.where(up, high, low)
    chosen = jnp.where(jnp.isnan(size), size, chosen)
    return jnp.copysign(chosen, x.astype(jnp.float32)).astype(ROOT)


def _bits(x: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)


def _hash(*seeds: Any) -> jax.Array:
    """Numbers like random ones from 0 to 2³² − 1, from the bits of others."""
    odd = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
    first, *others = (
        _bits(x) * jnp.uint32(k) for x, k in zip(seeds, odd, strict=False)
    )
    mixed = sum(others, first)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    return (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
