"""A run over a sequence of tasks, as pure functions of arrays.

:func:`learner` makes the pieces, which a driver calls one epoch at a time;
:func:`train` is the whole run as one function, to ``jit``, ``vmap`` or ``pmap``. Both
give the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import si_jax
from si_jax.data import Examples
from si_jax.models import mask_logits
from si_jax.tasks import Task, shuffle


class Model(Protocol):
    """A network, such as a Flax module: images ``(batch, …)`` to logits."""

    @property
    def init(self) -> Callable[..., Any]:
        """``(key, images) → params``."""

    @property
    def apply(self) -> Callable[..., Any]:
        """``(params, images) → logits (batch, outputs)``."""


class Carry(NamedTuple):
    """What training changes.

    Attributes:
      params: the network's parameters.
      opt_state: the optimizer's state, with Synaptic Intelligence's inside.
    """

    params: optax.Params
    opt_state: optax.OptState


class Epoch(NamedTuple):
    """What an epoch reports: float32 scalars.

    Attributes:
      loss: the task's cross-entropy in nats, without the surrogate loss, averaged over
        the examples as they were seen.
      accuracy: the fraction of them that was classified correctly.
      surrogate_loss: the penalty of eq. 4 at the epoch's end.
      path_integral: Σω gained in the epoch, the drop of the loss by eq. 3.
      loss_drop: how far the loss did fall in the epoch, on the task's first 500
        examples; Σω is larger by what minibatch noise adds.
      negative: the fraction of parameters whose ω is negative at the epoch's end, and
        so their ω/(Δ² + ξ).
      importance: the largest Ω.
    """

    loss: jax.Array
    accuracy: jax.Array
    surrogate_loss: jax.Array
    path_integral: jax.Array
    loss_drop: jax.Array
    negative: jax.Array
    importance: jax.Array


class Learner(NamedTuple):
    """The pieces of a run.

    Attributes:
      init: ``key → carry``.
      epoch: ``(carry, examples, task, key) → (carry, Epoch)``, one pass in random
        order.
      finish: ``carry → carry`` at a task's end: consolidation, the optimizer's reset.
      evaluate: ``(carry, examples, tasks) → accuracy (tasks,)``.
    """

    init: Callable[[jax.Array], Carry]
    epoch: Callable[[Carry, Examples, Task, jax.Array], tuple[Carry, Epoch]]
    finish: Callable[[Carry], Carry]
    evaluate: Callable[[Carry, Examples, Task], jax.Array]


class Result(NamedTuple):
    """What a run leaves: accuracies in rows after each task, columns on each task.

    Attributes:
      test: float32 ``(tasks, tasks)`` on the test examples.
      train: float32 ``(tasks, tasks)`` on the training examples.
      initial: float32 ``(tasks,)``, the untrained network's on the test examples.
      epochs: :class:`Epoch` of float32 ``(tasks, epochs)``.
    """

    test: jax.Array
    train: jax.Array
    initial: jax.Array
    epochs: Epoch


def learner(
    model: Model,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    *,
    batch_size: int,
    reset_optimizer: bool,
) -> Learner:
    """Bind a network and an optimizer to the pieces of a run.

    Args:
      model: a network for float32 images ``(batch, *image_shape)`` in [0, 1].
      tx: an optimizer with Synaptic Intelligence; strength 0 is the plain optimizer.
        Its hyperparameters may be traced.
      image_shape: height, width, channels.
      batch_size: examples a step; an epoch's last batch may be smaller.
      reset_optimizer: start every task with a fresh optimizer.

    Returns:
      A :class:`Learner`.
    """

    def logits(
        params: optax.Params, images: jax.Array, classes: jax.Array
    ) -> jax.Array:
        return mask_logits(model.apply(params, images), classes)

    def gather(
        examples: Examples, task: Task, order: jax.Array, i: jax.Array, size: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Batch i: images, labels, and 1 or 0 for what is there or beyond the end."""
        positions = i * size + jnp.arange(size, dtype=jnp.int32)
        rows = order.at[positions].get(mode="clip")
        images = jnp.asarray(examples.images)[rows].astype(jnp.float32) / 255
        there = (positions < task.size).astype(jnp.float32)
        return images, jnp.asarray(examples.labels)[rows], there

    def init(key: jax.Array) -> Carry:
        params = model.init(key, jnp.zeros((1, *image_shape)))
        return Carry(params, tx.init(params))

    def epoch(
        carry: Carry, examples: Examples, task: Task, key: jax.Array
    ) -> tuple[Carry, Epoch]:
        order = shuffle(task, key)

        def sums(params, images, labels, there):
            out = logits(params, images, task.classes)
            losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
            correct = (out.argmax(-1) == labels).astype(jnp.float32)
            # The padding's label may be masked, its loss infinite: no product will do.
            total = jnp.sum(jnp.where(there > 0, losses, 0))
            return total / there.sum(), (total, jnp.sum(correct * there))

        def step(i, state):
            (params, opt_state), seen = state
            batch = gather(examples, task, order, i, batch_size)
            grads, new = jax.grad(sums, has_aux=True)(params, *batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            carry = Carry(optax.apply_updates(params, updates), opt_state)
            return carry, jax.tree.map(jnp.add, seen, new)

        def total_path_integral(carry):
            omega = si_jax.synapses(carry.opt_state).path_integral
            return sum(jax.tree.leaves(jax.tree.map(jnp.sum, omega)), jnp.zeros(()))

        first = gather(examples, task, task.rows, jnp.int32(0), 500)
        steps = (task.size + batch_size - 1) // batch_size
        start, zero = carry, jnp.zeros(())
        carry, (loss, correct) = jax.lax.fori_loop(
            0, steps, step, (start, (zero, zero))
        )
        size = task.size.astype(jnp.float32)
        synapses = si_jax.synapses(carry.opt_state)
        omega = jnp.concatenate(
            list(map(jnp.ravel, jax.tree.leaves(synapses.path_integral)))
        )
        return carry, Epoch(
            loss=loss / size,
            accuracy=correct / size,
            surrogate_loss=si_jax.surrogate_loss(carry.opt_state, carry.params),
            path_integral=total_path_integral(carry) - total_path_integral(start),
            loss_drop=sums(start.params, *first)[0] - sums(carry.params, *first)[0],
            negative=jnp.mean(omega < 0, dtype=jnp.float32),
            importance=jnp.stack(
                [x.max() for x in jax.tree.leaves(synapses.importance)]
            ).max(),
        )

    def finish(carry: Carry) -> Carry:
        opt_state = si_jax.consolidate(carry.opt_state, carry.params)
        if reset_optimizer:
            opt_state = si_jax.reset_optimizer(tx, opt_state, carry.params)
        return Carry(carry.params, opt_state)

    def evaluate(carry: Carry, examples: Examples, tasks: Task) -> jax.Array:
        size = 1000  # bounds memory; the result does not depend on it

        def accuracy(task):
            def count(i, correct):
                images, labels, there = gather(examples, task, task.rows, i, size)
                out = logits(carry.params, images, task.classes)
                hits = (out.argmax(-1) == labels).astype(jnp.float32)
                return correct + jnp.sum(hits * there)

            batches = (task.size + size - 1) // size
            correct = jax.lax.fori_loop(0, batches, count, jnp.zeros(()))
            return correct / task.size.astype(jnp.float32)

        return jax.lax.map(accuracy, tasks)

    return Learner(init, epoch, finish, evaluate)


def epoch_key(
    key: jax.Array, task: jax.Array | int, epoch: jax.Array | int
) -> jax.Array:
    """The key of a run's epoch, the same for every driver."""
    return jax.random.fold_in(jax.random.fold_in(key, task + 1), epoch)


def init_key(key: jax.Array) -> jax.Array:
    """The key of a run's initial parameters, unlike that of any epoch."""
    return jax.random.fold_in(key, 0)


def train(
    learner: Learner,
    key: jax.Array,
    train_examples: Examples,
    test_examples: Examples,
    train_tasks: Task,
    test_tasks: Task,
    *,
    epochs: int,
) -> Result:
    """One whole run: a scan over the tasks of a scan over the epochs.

    Args:
      learner: from :func:`learner`.
      key: the run is a function of it.
      train_examples: the training set.
      test_examples: the test set.
      train_tasks: the tasks' training examples, stacked.
      test_tasks: their test examples.
      epochs: passes over each task.

    Returns:
      A :class:`Result`.
    """
    carry = learner.init(init_key(key))
    initial = learner.evaluate(carry, test_examples, test_tasks)

    def one_task(carry, inputs):
        number, task = inputs

        def one_epoch(carry, i):
            return learner.epoch(carry, train_examples, task, epoch_key(key, number, i))

        carry, reports = jax.lax.scan(one_epoch, carry, jnp.arange(epochs))
        carry = learner.finish(carry)
        test = learner.evaluate(carry, test_examples, test_tasks)
        train = learner.evaluate(carry, train_examples, train_tasks)
        return carry, (test, train, reports)

    numbers = jnp.arange(len(train_tasks.size))
    _, (test, train, reports) = jax.lax.scan(one_task, carry, (numbers, train_tasks))
    return Result(test, train, initial, reports)
