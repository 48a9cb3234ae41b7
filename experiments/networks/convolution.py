"""Convolutions whose gradients are fast inside compiled loops on a CPU."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ORDER = ("NHWC", "HWIO", "NHWC")  # of a convolution's axes, as Flax has them


COUNTS = (
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "batch_group_count",
)


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Sequence[tuple[int, int]] | str,
    **kwargs: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``; on a CPU, most often as matrix products.

    XLA rewrites convolutions into the form that its CPU library takes, but not inside
    of loops: there the gradient of one is tens of times slower than this. A 3 × 3
    kernel of many channels goes through :func:`winograd`, in float32 at least; any
    other is one product, of all patches. What has strides, dilation, groups or axes in
    another order is left to ``jax.lax``.

    Args:
      images: ``(batch, height, width, channels)``.
      kernel: ``(rows, columns, channels, outputs)``.
      strides: in both directions.
      padding: ``"VALID"``, ``"SAME"`` or the rows and columns to add at the edges.
      **kwargs: further arguments of ``jax.lax.conv_general_dilated``; without
        ``dimension_numbers`` the axes are in the order given here, Flax's.

    Returns:
      ``(batch, height', width', outputs)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.networks import convolution
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
      >>> print(convolution.convolve(images, kernel, (1, 1), "VALID")[0, :, :, 0])
      [[18. 18.]
       [18. 18.]]
    """
    kwargs = {"dimension_numbers": ORDER} | kwargs
    plain = _plain(images, kernel, strides, padding, kwargs)
    if jax.default_backend() != "cpu" or not plain:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **kwargs)
    rows, columns = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(
            images.shape[1:3], (rows, columns), strides, padding
        )
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    wide = jnp.finfo(images.dtype).bits >= 32  # Winograd's sums cost bfloat16 too much
    if wide and kernel.shape[:2] == (3, 3) and kernel.shape[2] >= 16:
        return winograd(images, kernel)
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    patches = [
        images[:, i : i + height, j : j + width]
        for i in range(rows)
        for j in range(columns)
    ]
    return _product(jnp.concatenate(patches, -1), kernel.reshape(-1, kernel.shape[-1]))


def _plain(images: Any, kernel: Any, strides: Any, padding: Any, others: Any) -> bool:
    """Whether a convolution is of images, a window at each pixel, and no more."""
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        return False
    asked, here = (
        jax.lax.conv_dimension_numbers(images.shape, kernel.shape, order)
        for order in (others["dimension_numbers"], ORDER)
    )
    ones = [strides, *(others.get(name) for name in COUNTS)]
    known = {*COUNTS, "dimension_numbers", "precision"}
    return (
        asked == here
        and all(x is None or np.all(np.equal(x, 1)) for x in ones)
        and all(others[name] is None for name in others.keys() - known)
        and (isinstance(padding, str) or np.min(padding) >= 0)
    )


def winograd(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3 × 3 convolution without padding, in 16 multiplications where there were 36.

    Winograd's F(2 × 2, 3 × 3): a tile of 4 × 4 pixels d gives the 2 × 2 outputs
    Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A under the kernel g, the products being summed over the
    channels. So each of a tile's 16 places is a matrix product over all tiles.

    Args:
      images: ``(batch, height, width, channels)``, 3 × 3 pixels at least.
      kernel: ``(3, 3, channels, outputs)``, of the same dtype.

    Returns:
      ``(batch, height − 2, width − 2, outputs)``, in float32 as exact as
      ``jax.lax``'s; so are the gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.networks import convolution
      >>> images, kernel = jnp.ones((1, 4, 5, 2)), jnp.ones((3, 3, 2, 1))
      >>> print(convolution.winograd(images, kernel)[0, :, :, 0])
      [[18. 18. 18.]
       [18. 18. 18.]]

    References:
      Lavin & Gray, `Fast algorithms for convolutional neural networks
      <https://arxiv.org/abs/1509.09308>`_, 2016, section 4.1.
    """
    batch, height, width, _ = images.shape
    rows, columns = (height - 1) // 2, (width - 1) // 2  # of tiles, two pixels apart
    beyond = (0, 2 * rows + 2 - height), (0, 2 * columns + 2 - width)
    images = jnp.pad(images, ((0, 0), *beyond, (0, 0)))

    def pixel(i, j):
        return images[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2]

    def both_ways(transform, square):
        columns = [transform(*column) for column in zip(*square, strict=True)]
        return [transform(*row) for row in zip(*columns, strict=True)]

    def b(x0, x1, x2, x3):
        return x0 - x2, x1 + x2, x2 - x1, x1 - x3

    def a(x0, x1, x2, x3):
        return x0 + x1 + x2, x1 - x2 - x3

    halves = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    g = jnp.array(halves, kernel.dtype)
    kernels = jnp.einsum("ik,jl,klco->ijco", g, g, kernel)
    tiles = both_ways(b, [[pixel(i, j) for j in range(4)] for i in range(4)])
    products = [
        [_product(tiles[i][j], kernels[i, j]) for j in range(4)] for i in range(4)
    ]
    pairs = [jnp.stack(row, 3) for row in both_ways(a, products)]
    outputs = jnp.stack(pairs, 2).reshape(batch, 2 * rows, 2 * columns, -1)
    return outputs[:, : height - 2, : width - 2]


def _product(images: jax.Array, matrix: jax.Array) -> jax.Array:
    """Every pixel's channels times a matrix, written as a product of two matrices.

    With the images' axes kept, XLA:CPU's gradient undoes what Winograd's form gains.
    """
    pixels = images.reshape(-1, len(matrix)) @ matrix
    return pixels.reshape(*images.shape[:-1], -1)


def halve(images: jax.Array) -> jax.Array:
    """Max-pool 2 × 2, without an odd last row or column.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.networks import convolution
      >>> print(convolution.halve(jnp.arange(15.0).reshape(1, 3, 5, 1))[0, :, :, 0])
      [[6. 8.]]
    """
    batch, height, width, channels = images.shape
    height, width = height // 2, width // 2
    images = images[:, : 2 * height, : 2 * width]
    return images.reshape(batch, height, 2, width, 2, channels).max((2, 4))
