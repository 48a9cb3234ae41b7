"""A small language model of bytes, in Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

BYTES = 256


class Transformer(nnx.Module):
    """A decoder: each byte of a text is predicted from those before it.

    Layer norms come before attention and before the perceptron, whose width is four
    times that of the network; positions are learned.

    Attributes:
      embed: the bytes' vectors.
      place: the positions' vectors.
      blocks: the layers.
      norm: the layer norm of what they sum to.
      head: the logits.

    Args:
      width: of the vectors; a multiple of ``heads``.
      layers: how many.
      heads: of attention.
      length: the longest text, in bytes.
      rngs: to draw the parameters with.
      lora_rank: of an adapter beside each layer's four matrices; 0: none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from experiments.networks.transformer import Transformer
      >>> model = Transformer(32, layers=2, heads=4, length=16, rngs=nnx.Rngs(0))
      >>> print(model(jnp.zeros((3, 16), jnp.uint8)).shape)
      (3, 16, 256)
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      42368
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        heads: int,
        length: int,
        rngs: nnx.Rngs,
        lora_rank: int = 0,
    ):
        small = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(BYTES, width, embedding_init=small, rngs=rngs)
        self.place = nnx.Embed(length, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, lora_rank, rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Logits ``(…, length, 256)`` of the bytes that follow those of ``text``.

        Raises:
          ValueError: if the text is longer than the network's longest.
        """
        length, longest = text.shape[-1], self.place.num_embeddings
        if length > longest:
            raise ValueError(
                f"the text has {length} bytes, the network is for {longest} at most."
            )
        places = self.place(jnp.arange(length))
        x = self.embed(text.astype(jnp.int32))
        x = x + jnp.broadcast_to(places, x.shape)
        # One axis for all bytes of all texts: with two, every matrix's gradient would
        # make XLA copy its other factor, transposed.
        x = x.reshape(-1, x.shape[-1])
        for block in self.blocks:
            x = block(x, length)
        return self.head(self.norm(x)).reshape(*text.shape, BYTES)


class Block(nnx.Module):
    """A layer: causal attention, then a perceptron, each added to what comes in."""

    def __init__(self, width: int, heads: int, lora_rank: int, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            if lora_rank:
                return nnx.LoRALinear(inputs, outputs, lora_rank=lora_rank, rngs=rngs)
            return nnx.Linear(inputs, outputs, rngs=rngs)

        self.heads = heads
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attend = linear(width, 3 * width)
        self.gather = linear(width, width)
        self.before_perceptron = nnx.LayerNorm(width, rngs=rngs)
        self.widen = linear(width, 4 * width)
        self.narrow = linear(4 * width, width)

    def __call__(self, x: jax.Array, length: int) -> jax.Array:
        """``(bytes, width)``, text after text."""
        parts = self.attend(self.before_attention(x))
        width = x.shape[-1] // self.heads
        split = parts.reshape(-1, length, 3, self.heads, width)
        query, key, value = (split[:, :, i] for i in range(3))
        attention = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.gather(attention.reshape(x.shape))
        return x + self.narrow(nnx.relu(self.widen(self.before_perceptron(x))))


def functional(
    make: Callable[[jax.Array], nnx.Module], *trained: Any
) -> tuple[Callable[[jax.Array], Any], Callable[..., jax.Array]]:
    """An NNX model as two pure functions, for ``grad``, ``vmap`` and optimizers.

    Args:
      make: ``key → model``.
      *trained: the kinds of its variables that are trained, where they are not all of
        its ``nnx.Param``: ``nnx.LoRAParam``, say. The rest are the base.

    Returns:
      ``init: key → params`` and ``apply: (params, inputs) → outputs``; if ``trained``
      is given, ``(params, base, inputs) → outputs``, where ``base`` is ``params`` of
      the model without adapters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from experiments.networks.transformer import functional
      >>> init, apply = functional(lambda key: nnx.Linear(3, 2, rngs=nnx.Rngs(key)))
      >>> params = init(jax.random.key(0))
      >>> print(apply(params, jnp.ones((5, 3))).shape)
      (5, 2)
    """
    kinds = (*trained, nnx.Param) if trained else (nnx.Param,)
    # The structure is that of an abstract model: no memory, and the same under jit.
    graph, *_ = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))), *kinds)

    def init(key: jax.Array) -> Any:
        return nnx.split(make(key), *kinds)[1]

    def apply(*arguments: Any) -> jax.Array:
        *variables, inputs = arguments
        return nnx.merge(graph, *variables)(inputs)

    return init, apply
