"""The networks of the paper's experiments, in Flax."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers


class MLP(nn.Module):
    """ReLU layers and one linear output layer; Glorot kernels, zero biases.

    Attributes:
      hidden: the widths of the hidden layers.
      outputs: the number of outputs, all tasks' together.
      zero_init_output: start the output kernel at zero, as the authors do for their
        multi-head networks.
      dropout: the fraction of each hidden layer's units that are dropped in a call with
        ``rngs={"dropout": key}``; a call without a key drops none.
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


def mask_logits(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Multi-head readout: the logits of classes that take no part become −∞.

    Args:
      logits: ``(…, outputs)``.
      classes: bool ``(outputs,)``.

    Returns:
      ``(…, outputs)``, the dtype of ``logits``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from si_jax import models
      >>> logits, classes = jnp.array([3.0, 1.0, 1.0]), jnp.array([False, True, True])
      >>> print(jax.nn.softmax(models.mask_logits(logits, classes)))
      [0.  0.5 0.5]
    """
    return jnp.where(jnp.broadcast_to(classes, logits.shape), logits, -jnp.inf)
