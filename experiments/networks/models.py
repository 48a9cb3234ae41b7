"""The networks of the paper's experiments, in Flax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax.typing import DTypeLike

from experiments.networks.convolution import convolve, halve


class MLP(nn.Module):
    """ReLU layers and one linear output layer; Glorot kernels, zero biases.

    Attributes:
      hidden: the widths of the hidden layers.
      outputs: the number of outputs, all tasks' together.
      zero_init_output: start the output kernel at zero, as the authors do for their
        multi-head networks.
      dropout: the fraction of each hidden layer's units that are dropped in a call with
        ``rngs={"dropout": key}``; a call without a key drops none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.networks import models
      >>> model, images = models.MLP((256, 256), 10), jnp.ones((2, 28, 28, 1))
      >>> params = model.init(jax.random.key(0), images)
      >>> print(model.apply(params, images).shape)
      (2, 10)
    """

    hidden: tuple[int, ...]
    outputs: int
    zero_init_output: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``(batch, outputs)`` of float images ``(batch, …)``."""
        glorot = initializers.glorot_uniform()
        x = images.reshape(len(images), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=glorot)(x))
            x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng("dropout"))
        output_init = initializers.zeros if self.zero_init_output else glorot
        return nn.Dense(self.outputs, kernel_init=output_init)(x)


class CNN(nn.Module):
    """The convolutional network for CIFAR; Glorot kernels, zero biases.

    Two blocks of two 3 × 3 convolutions with a pool, and a dense layer; a call with
    ``rngs={"dropout": key}`` drops a quarter of each block's outputs and half of the
    dense layer's.

    Attributes:
      outputs: the number of outputs, all tasks' together.
      zero_init_output: start the output kernel at zero.
      dtype: what to compute in; the parameters and the logits are float32.
      convolve: the convolution, by default :func:`convolve`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.networks import models
      >>> params = models.CNN(60).init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
      >>> print(sum(x.size for x in jax.tree.leaves(params)))
      1276508
    """

    outputs: int
    zero_init_output: bool = True
    dtype: DTypeLike = jnp.float32
    convolve: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``(batch, outputs)`` of float images ``(batch, 32, 32, 3)``."""
        glorot = initializers.glorot_uniform()
        training = self.has_rng("dropout")
        x = images.astype(self.dtype)
        for width in (32, 64):
            for padding in ("SAME", "VALID"):
                conv = nn.Conv(
                    width,
                    (3, 3),
                    padding=padding,
                    kernel_init=glorot,
                    dtype=self.dtype,
                    conv_general_dilated=self.convolve or convolve,
                )
                x = nn.relu(conv(x))
            x = halve(x)
            x = nn.Dropout(0.25)(x, deterministic=not training)
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(512, kernel_init=glorot, dtype=self.dtype)(x))
        x = nn.Dropout(0.5)(x, deterministic=not training)
        output_init = initializers.zeros if self.zero_init_output else glorot
        x = nn.Dense(self.outputs, kernel_init=output_init, dtype=self.dtype)(x)
        return x.astype(jnp.float32)
