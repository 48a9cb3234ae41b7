"""Training a language model of bytes on one text after another, as pure functions.

The pieces are those of :mod:`experiments.training.loop`, so the same drivers run them;
only what an example is, and what is measured, is another: windows of a text, and bits a
byte.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from experiments.training.loop import (
    Boundary,
    Carry,
    Epoch,
    Learner,
    check_parts,
    descend,
    if_finite,
    in_turn,
    sum_over_parts,
    with_synapses,
)

Logits = Callable[[optax.Params, jax.Array], jax.Array]
"""``(params, text (…, length)) → logits (…, length, 256)`` of the bytes that follow."""


class Texts(NamedTuple):
    """Several texts, one behind the other.

    Attributes:
      content: uint8 ``(bytes,)``, with the parts that are held out.
      begin: int32 ``(texts,)``, where in it each begins.
      size: int32 ``(texts,)``, how many of its bytes, the first, are trained on.
    """

    content: Any
    begin: Any
    size: Any


class Stage(NamedTuple):
    """What is trained on for an epoch, or several stacked along a first axis.

    Attributes:
      shares: float32 ``(texts,)``, the probability that a sequence of a batch is of
        each text.
      steps: int32 scalar, how many an epoch has.
    """

    shares: Any
    steps: Any


def join(texts: Sequence[np.ndarray], held_out: float = 0.0) -> Texts:
    """Several texts as one array.

    Args:
      texts: each uint8 ``(bytes,)``.
      held_out: the fraction at each one's end that is not trained on.

    Example:
      >>> import numpy as np
      >>> from experiments.training import language
      >>> texts = [np.frombuffer(x, np.uint8) for x in (b"abcd", b"ef")]
      >>> joined = language.join(texts, held_out=0.5)
      >>> print(joined.content, joined.begin, joined.size)
      [ 97  98  99 100 101 102] [0 4] [2 1]
    """
    sizes = [len(x) for x in texts]
    begin = np.concatenate([[0], np.cumsum(sizes[:-1])])
    trained = [size - round(held_out * size) for size in sizes]
    return Texts(
        np.concatenate(texts), begin.astype(np.int32), np.array(trained, np.int32)
    )


def spread(begin: int, size: int, count: int, length: int) -> np.ndarray:
    """Where ``count`` windows start that are evenly spread over a part of a text.

    They overlap if there is no room for as many.

    Args:
      begin: where the part begins.
      size: its bytes, ``length`` at least.
      count: of windows.
      length: of each, in bytes.

    Returns:
      int32 ``(count,)``.

    Example:
      >>> from experiments.training import language
      >>> print(language.spread(100, 10, count=3, length=4))
      [100 103 106]
    """
    return np.linspace(begin, begin + size - length, count).astype(np.int32)


def cut(content: ArrayLike, starts: ArrayLike, length: int) -> jax.Array:
    """The windows of a text that start there: ``(…,)`` to ``(…, length)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.training import language
      >>> print(language.cut(jnp.arange(10), jnp.array([2, 5]), length=3))
      [[2 3 4]
       [5 6 7]]
    """
    offsets = jnp.arange(length, dtype=jnp.int32)
    starts = jnp.asarray(starts)[..., None]
    shape = (*starts.shape[:-1], length)
    places = jnp.broadcast_to(starts, shape) + jnp.broadcast_to(offsets, shape)
    return jnp.asarray(content)[places]


def draw(
    texts: Texts, shares: jax.Array, key: jax.Array, count: int, length: int
) -> jax.Array:
    """Random windows of the texts, each text as often as its share says.

    Args:
      texts: what to take them from.
      shares: float32 ``(texts,)``.
      key: what they are a function of.
      count: of windows.
      length: of each, in bytes.

    Returns:
      uint8 ``(count, length)``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from experiments.training import language
      >>> texts = language.join([np.zeros(9, np.uint8), np.arange(5, dtype=np.uint8)])
      >>> second = jnp.array([0.0, 1.0])
      >>> print(language.draw(texts, second, jax.random.key(0), 2, length=4))
      [[0 1 2 3]
       [0 1 2 3]]
    """
    text_key, start_key = jax.random.split(key)
    # A share of 0 becomes −∞, which is never drawn.
    which = jax.random.categorical(text_key, jnp.log(shares), shape=(count,))
    begin, size = (jnp.asarray(x)[which] for x in (texts.begin, texts.size))
    starts = jax.random.randint(start_key, (count,), begin, begin + size - length + 1)
    return cut(texts.content, starts, length)


def learner(
    logits: Logits,
    tx: optax.GradientTransformation,
    start: Callable[[jax.Array], Carry],
    *,
    batch_size: int,
    length: int,
    boundary: Sequence[Boundary] = (),
    micro_batch: int = 0,
) -> Learner:
    """Bind a language model and an optimizer to the pieces of a run.

    Args:
      logits: the model.
      tx: an optimizer, with Synaptic Intelligence or without.
      start: ``key → carry`` to begin with.
      batch_size: sequences a step.
      length: bytes of a sequence that are predicted, from those before.
      boundary: what to do at a text's end, as of
        :func:`experiments.training.classifier.learner`, with :class:`Texts` for
        examples and a :class:`Stage` for the task.
      micro_batch: add up the gradient of a batch over parts of this size, which must
        divide it: the same gradient in less memory. 0 takes the batch as a whole.

    Returns:
      A :class:`~experiments.training.loop.Learner`. Its ``epoch`` takes
      :class:`Texts` and a :class:`Stage`; its ``evaluate`` takes :class:`Texts` and,
      for each task, where in them windows of ``length + 1`` bytes start, int32
      ``(tasks, windows)``, and returns the loss on them in bits a byte, float32
      ``(tasks,)``.

    Raises:
      ValueError: if ``micro_batch`` does not divide ``batch_size``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from experiments.training import language
      >>> from experiments.training.loop import Carry
      >>> def logits(params, text):  # of the next byte, given the last
      ...     return params[text.astype(jnp.int32)]
      >>> def start(key):
      ...     params = jnp.zeros((256, 256))
      ...     return Carry(params, optax.sgd(256.0).init(params))
      >>> tx = optax.sgd(256.0)
      >>> pieces = language.learner(logits, tx, start, batch_size=4, length=8)
      >>> texts = language.join([np.frombuffer(b"abcd" * 50, np.uint8)])
      >>> whole = language.Stage(jnp.ones(1), jnp.int32(20))
      >>> carry = start(jax.random.key(0))
      >>> windows = jnp.array([[0, 50, 100]])
      >>> print(pieces.evaluate(carry, texts, windows).round(1))  # any byte
      [8.]
      >>> carry, _ = pieces.epoch(carry, texts, whole, jax.random.key(1))
      >>> print(pieces.evaluate(carry, texts, windows).round(1))
      [0.]
    """
    check_parts(batch_size, micro_batch)

    def measures(params: optax.Params, windows: jax.Array) -> tuple[Any, Any]:
        """The part's share of the mean loss in nats; its sums of losses and hits."""
        losses, hits = predicted(logits, params, windows)
        total = losses.sum()
        return total / (batch_size * length), (total, hits.sum(dtype=jnp.float32))

    def gradient(params: optax.Params, windows: jax.Array) -> Any:
        def part(windows: jax.Array, _: Any) -> Any:
            return jax.grad(measures, has_aux=True)(params, windows)

        if not micro_batch:
            return part(windows, None)
        # Nothing is drawn in a part: any key will do.
        return sum_over_parts(part, windows, jax.random.key(0), micro_batch)

    def epoch(
        carry: Carry, texts: Texts, stage: Stage, key: jax.Array
    ) -> tuple[Carry, Epoch]:
        def of_batch(i, params):
            batch_key = jax.random.fold_in(key, i)
            windows = draw(texts, stage.shares, batch_key, batch_size, length + 1)
            return gradient(params, windows)

        end, (total, hits) = descend(tx, carry, stage.steps, of_batch)
        seen = stage.steps.astype(jnp.float32) * (batch_size * length)
        report = Epoch(loss=total / seen, accuracy=if_finite(total, hits) / seen)
        return end, with_synapses(report, carry, end)

    def evaluate(carry: Carry, texts: Texts, starts: jax.Array) -> jax.Array:
        def bits(starts):
            def losses(start):
                window = cut(texts.content, start, length + 1)
                return predicted(logits, carry.params, window)[0]

            at_once = micro_batch or batch_size
            return jax.lax.map(losses, starts, batch_size=at_once).mean() / jnp.log(2.0)

        return jax.lax.map(bits, jnp.asarray(starts))

    return Learner(start, epoch, in_turn(boundary), evaluate)


def predicted(
    logits: Logits, params: optax.Params, windows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How well each byte of a text is predicted from those before it.

    Args:
      logits: the model.
      params: its parameters.
      windows: uint8 ``(…, length + 1)``.

    Returns:
      The losses in nats, float32 ``(…, length)``, and whether the most probable byte
      is the right one, bool ``(…, length)``.
    """
    windows = windows.astype(jnp.int32)
    labels = windows[..., 1:]
    out = logits(params, windows[..., :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
    return losses, out.argmax(-1) == labels


def divergence(
    before: tuple[Logits, optax.Params],
    after: tuple[Logits, optax.Params],
    windows: jax.Array,
) -> jax.Array:
    """How far a model has moved from another one on a text, KL(after ‖ before).

    Args:
      before: a model and its parameters.
      after: likewise.
      windows: uint8 ``(…, length + 1)``; each byte is predicted from those before it.

    Returns:
      Bits a byte, a float32 scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.training import language
      >>> def logits(log_odds, text):  # of the first byte, alike everywhere
      ...     one = log_odds + jnp.log(255.0)
      ...     return jnp.zeros((*text.shape, 256)).at[..., 0].set(one)
      >>> windows = jnp.zeros((2, 4), jnp.uint8)
      >>> even, sure = (logits, 0.0), (logits, 99.0)
      >>> print(language.divergence(even, sure, windows).round(3))
      1.0
    """
    text = windows[..., :-1].astype(jnp.int32)

    def log_p(model: tuple[Logits, optax.Params]) -> jax.Array:
        logits, params = model
        return jax.nn.log_softmax(logits(params, text).astype(jnp.float32))

    new = log_p(after)
    nats = jnp.sum(jnp.exp(new) * (new - log_p(before)), axis=-1)
    return nats.mean() / jnp.log(2.0)


def sample(
    logits: Logits,
    params: optax.Params,
    prompt: jax.Array,
    key: jax.Array,
    *,
    count: int,
    length: int,
    temperature: float = 1.0,
) -> jax.Array:
    """Let the model go on with a text.

    Args:
      logits: the model.
      params: its parameters.
      prompt: uint8 ``(bytes,)``, one at least; of more than ``length`` the last are
        seen.
      key: to draw the bytes with.
      count: how many bytes to write.
      length: how many bytes the model sees at most.
      temperature: by which the logits are divided; the smaller, the less is left to
        chance.

    Returns:
      uint8 ``(count,)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.training import language
      >>> def successor(_, text):
      ...     return 99 * jax.nn.one_hot(text.astype(jnp.int32) + 1, 256)
      >>> prompt = jnp.frombuffer(b"ab", jnp.uint8)
      >>> found = language.sample(
      ...     successor, None, prompt, jax.random.key(0), count=4, length=3
      ... )
      >>> print(bytes(found.tolist()).decode())
      cdef
    """
    seen = prompt[-length:]
    # Always of one length; a decoder does not look at the zeros behind.
    window = jnp.zeros(length, jnp.uint8).at[: len(seen)].set(seen)

    def write(running, key):
        window, filled = running
        out = logits(params, window)[filled - 1] / temperature
        new = jax.random.categorical(key, out).astype(jnp.uint8)
        full = filled == length
        window = jnp.where(full, jnp.roll(window, -1), window)
        place = jnp.where(full, length - 1, filled)
        return (window.at[place].set(new), place + 1), new

    keys = jax.random.split(key, count)
    return jax.lax.scan(write, (window, jnp.int32(len(seen))), keys)[1]
