"""A classifier of images as the pieces of a run."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.data.tasks import Task, look_up, mask_logits, shuffle
from experiments.training.loop import (
    AnyExamples,
    Boundary,
    Carry,
    Epoch,
    Learner,
    Model,
    check_parts,
    descend,
    if_finite,
    in_turn,
    sum_over_parts,
    with_synapses,
)


def learner(
    model: Model,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    *,
    batch_size: int,
    boundary: Sequence[Boundary] = (),
    dropout: bool = False,
    micro_batch: int = 0,
) -> Learner:
    """Bind a network and an optimizer to the pieces of a run.

    Args:
      model: a network for float32 images ``(batch, *image_shape)`` in [0, 1].
      tx: an optimizer, with Synaptic Intelligence (at strength 0 it only measures) or
        without. Its hyperparameters may be traced.
      image_shape: height, width, channels.
      batch_size: examples a step; an epoch's last batch may be smaller.
      boundary: what to do at a task's end, one after the other, with one key:
        :func:`consolidate`, :func:`consolidate_fisher`, :func:`reset`, or one's own.
      dropout: whether the network takes a key in training, ``rngs={"dropout": key}``.
      micro_batch: add up the gradient of a batch over parts of this size, which must
        divide it: the same gradient (but for the units that are dropped) in less
        memory, and on a CPU several times faster for convolutions, whose data then
        stays in the cache; evaluates in parts of it, too. 0 takes the batch as a whole.

    Returns:
      A :class:`Learner`. For an example see :func:`train`.

    Raises:
      ValueError: if ``micro_batch`` does not divide ``batch_size``.
    """
    check_parts(batch_size, micro_batch)

    def init(key: jax.Array) -> Carry:
        params = model.init(key, jnp.zeros((1, *image_shape)))
        return Carry(params, tx.init(params))

    return Learner(
        init,
        _epoch_of(model, tx, batch_size, dropout, micro_batch),
        in_turn(boundary),
        _evaluate_of(model, micro_batch or 1000),
    )


def _gather(
    examples: AnyExamples, task: Task, order: jax.Array, i: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch i: images, labels, and 1 or 0 for what is there or beyond the end."""
    positions = i * size + jnp.arange(size, dtype=jnp.int32)
    rows = order.at[positions].get(mode="clip")
    mask = (positions < task.size).astype(jnp.float32)
    return *look_up(examples, rows), mask


def _loss_of(model: Model) -> Callable[..., tuple[jax.Array, tuple[Any, Any]]]:
    """A batch's summed loss over ``count``; besides, the sums of losses and hits."""

    def loss(params, count, classes, images, labels, mask, **rngs):
        out = mask_logits(model.apply(params, images, **rngs), classes)
        losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
        correct = (out.argmax(-1) == labels).astype(jnp.float32)
        # The padding's label may be masked, its loss infinite: no product will do.
        total = jnp.sum(jnp.where(mask > 0, losses, 0))
        return total / count, (total, jnp.sum(correct * mask))

    return loss


def _epoch_of(
    model: Model,
    tx: optax.GradientTransformation,
    batch_size: int,
    dropout: bool,
    micro_batch: int,
) -> Callable[..., tuple[Carry, Epoch]]:
    """The pass over a task: see :class:`Learner`."""
    loss = _loss_of(model)

    def gradient(params, classes, batch, key):
        """Of the batch's mean loss; the sums of its losses and hits."""
        # Of the whole batch: what its parts sum to is then its mean.
        count = batch[-1].sum()

        def part(examples, key):
            rngs = {"rngs": {"dropout": key}} if dropout else {}
            grad = jax.grad(loss, has_aux=True)
            return grad(params, count, classes, *examples, **rngs)

        if not micro_batch:
            return part(batch, key)
        return sum_over_parts(part, batch, key, micro_batch)

    def epoch(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> tuple[Carry, Epoch]:
        # Without dropout the order alone draws from the key.
        order_key, dropout_key = jax.random.split(key) if dropout else (key, key)
        order = shuffle(task, order_key)

        def of_batch(i, params):
            batch = _gather(examples, task, order, i, batch_size)
            return gradient(
                params, task.classes, batch, jax.random.fold_in(dropout_key, i)
            )

        steps = (task.size + batch_size - 1) // batch_size
        end, (total, correct) = descend(tx, carry, steps, of_batch)
        size = task.size.astype(jnp.float32)
        mean_loss = _sample_loss_of(model, examples, task, micro_batch)
        report = Epoch(
            loss=total / size,
            accuracy=if_finite(total, correct) / size,
            loss_drop=mean_loss(carry.params) - mean_loss(end.params),
        )
        return end, with_synapses(report, carry, end)

    return epoch


def _sample_loss_of(
    model: Model, examples: AnyExamples, task: Task, micro_batch: int
) -> Callable[[optax.Params], jax.Array]:
    """The mean loss of some 500 examples spread over the task."""
    loss = _loss_of(model)
    few = min(500, task.rows.shape[-1])
    at_once = min(micro_batch or few, few)
    few -= few % at_once
    # Of a task with fewer, some of its examples are taken again: all of them count.
    spread = task.rows[jnp.arange(few, dtype=jnp.int32) * task.size // few]
    sample = *look_up(examples, spread), jnp.ones(few)

    def mean_loss(params):
        def part(examples, _):
            return loss(params, jnp.float32(few), task.classes, *examples)[0]

        return sum_over_parts(part, sample, jax.random.key(0), at_once)

    return mean_loss


def _evaluate_of(model: Model, at_once: int) -> Callable[..., jax.Array]:
    """The accuracies: see :class:`Learner`; ``at_once`` bounds the memory."""

    def evaluate(carry: Carry, examples: AnyExamples, tasks: Task) -> jax.Array:
        size = min(at_once, tasks.rows.shape[-1])

        def accuracy(task):
            def count(i, correct):
                images, labels, mask = _gather(examples, task, task.rows, i, size)
                out = mask_logits(model.apply(carry.params, images), task.classes)
                # Of no numbers the largest would be the first.
                hits = if_finite(out.max(-1), out.argmax(-1) == labels)
                return correct + jnp.sum(jnp.where(mask > 0, hits, 0))

            batches = (task.size + size - 1) // size
            correct = jax.lax.fori_loop(0, batches, count, jnp.zeros(()))
            return correct / task.size.astype(jnp.float32)

        return jax.lax.map(accuracy, tasks)

    return evaluate
