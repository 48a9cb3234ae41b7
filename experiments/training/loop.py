"""A run over a sequence of tasks, as pure functions of arrays.

``classifier.learner`` and ``language.learner`` make the pieces, which a driver calls
one epoch at a time; :func:`train` is the whole run as one function, to ``jit``,
``vmap`` or ``pmap``. Both give the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import si_jax
from experiments.data.datasets import Examples
from experiments.data.tasks import PermutedExamples, Task
from si_jax import metrics, state, transform

AnyExamples = Examples | PermutedExamples


class Model(Protocol):
    """A network, such as a Flax module: images ``(batch, …)`` to logits."""

    @property
    def init(self) -> Callable[..., Any]:
        """``(key, images) → params``."""

    @property
    def apply(self) -> Callable[..., Any]:
        """``(params, images) → logits (batch, outputs)``; ``rngs`` as Flax has it."""


class Carry(NamedTuple):
    """What training changes.

    Attributes:
      params: the network's parameters.
      opt_state: the optimizer's state, with Synaptic Intelligence's inside if it has
        one.
      path_integrals: ω of the finished tasks, the newest last, where it is kept
        (:func:`remembering`): a tree like the parameters with a first axis over tasks.
    """

    params: optax.Params
    opt_state: optax.OptState
    path_integrals: optax.Params = None


class Epoch(NamedTuple):
    """What an epoch reports: float32 scalars, ``None`` where there is no such thing.

    Attributes:
      loss: the task's cross-entropy in nats, without the surrogate loss, averaged over
        the examples as they were seen.
      accuracy: the fraction of them that was classified correctly; NaN if the loss is
        no finite number.
      loss_drop: how far the loss fell in the epoch, on some 500 examples spread over
        the task.
      surrogate_loss: the penalty of eq. 4, SI's or EWC's, at the epoch's end.
      path_integral: Σω gained in the epoch, the drop of the loss by eq. 3; larger than
        ``loss_drop`` by what minibatch noise adds.
      negative: the fraction of parameters whose ω is negative at the epoch's end, and
        so their ω/(Δ² + ξ).
      importance: the largest Ω.
    """

    loss: jax.Array
    accuracy: jax.Array
    loss_drop: jax.Array | None = None
    surrogate_loss: jax.Array | None = None
    path_integral: jax.Array | None = None
    negative: jax.Array | None = None
    importance: jax.Array | None = None


Boundary = Callable[[Carry, Any, Any, jax.Array], Carry]
"""What happens between two tasks, ``(carry, examples, task, key) → carry``."""


class Learner(NamedTuple):
    """The pieces of a run, on images or (``experiments.training.language``) on texts.

    Attributes:
      init: ``key → carry``.
      epoch: ``(carry, examples, task, key) → (carry, Epoch)``, one pass in random
        order.
      finish: ``(carry, examples, task, key) → carry`` at a task's end: the boundary.
      evaluate: ``(carry, examples, tasks) → accuracy (tasks,)``; NaN where a network
        that diverged has no answer.
    """

    init: Callable[[jax.Array], Carry]
    epoch: Callable[[Carry, Any, Any, jax.Array], tuple[Carry, Epoch]]
    finish: Boundary
    evaluate: Callable[[Carry, Any, Any], jax.Array]


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


def remembering(learner: Learner, tasks: int) -> Learner:
    """``learner``, which also keeps ω of its last ``tasks`` tasks, for Fig. 5.

    Args:
      learner: with Synaptic Intelligence.
      tasks: at least 1.

    Returns:
      A :class:`Learner` whose :class:`Carry` has ``path_integrals``, 0 at first.
    """

    def init(key: jax.Array) -> Carry:
        carry = learner.init(key)
        none = jax.tree.map(lambda p: jnp.zeros((tasks, *p.shape)), carry.params)
        return carry._replace(path_integrals=none)

    def finish(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        # Before the boundary, which sets ω to 0.
        kept = jax.tree.map(
            lambda old, new: jnp.concatenate([old[1:], new[None]]),
            carry.path_integrals,
            si_jax.synapses(carry.opt_state).path_integral,
        )
        carry = carry._replace(path_integrals=kept)
        return learner.finish(carry, examples, task, key)

    return learner._replace(init=init, finish=finish)


def descend(
    tx: optax.GradientTransformation,
    carry: Carry,
    steps: jax.Array,
    gradient: Callable[[jax.Array, optax.Params], tuple[optax.Updates, Any]],
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Steps of an optimizer, in a compiled loop.

    Args:
      tx: the optimizer.
      carry: where to begin.
      steps: how many, an int32 scalar.
      gradient: ``(step, params) → (gradient, (loss, hits))``, of a batch; the latter
        two are summed over its examples.

    Returns:
      The carry after the last step, and ``(loss, hits)`` summed over all of them.
    """

    def step(i, running):
        (params, opt_state), seen = running
        grads, new = gradient(i, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), jax.tree.map(jnp.add, seen, new)

    zero = jnp.zeros(())
    # No scan: how many steps there are is traced, as tasks differ in size.
    (params, opt_state), seen = jax.lax.fori_loop(
        0, steps, step, ((carry.params, carry.opt_state), (zero, zero))
    )
    return carry._replace(params=params, opt_state=opt_state), seen


def in_turn(boundary: Sequence[Boundary]) -> Boundary:
    """One after the other, with one key."""

    def finish(carry: Carry, examples: Any, task: Any, key: jax.Array) -> Carry:
        for step in boundary:
            carry = step(carry, examples, task, key)
        return carry

    return finish


def check_parts(batch_size: int, micro_batch: int) -> None:
    """Refuse parts that do not divide a batch."""
    if micro_batch and batch_size % micro_batch:
        raise ValueError(
            f"micro_batch must divide the batch size {batch_size}, got {micro_batch}."
        )


def if_finite(value: jax.Array, then: jax.Array) -> jax.Array:
    """``then`` as float32; NaN where ``value`` is no finite number."""
    return jnp.where(jnp.isfinite(value), then.astype(jnp.float32), jnp.nan)


def sum_over_parts(
    function: Callable[[Any, jax.Array], Any], batch: Any, key: jax.Array, size: int
) -> Any:
    """``function`` of each part of a batch and a key of its own, summed.

    Args:
      function: ``(part, key) → tree of arrays``, such as gradients.
      batch: a tree of arrays ``(examples, …)``.
      key: split among the parts.
      size: examples in a part; must divide their number.

    Returns:
      What ``function`` returns, summed over the parts, one of them at a time.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.training.loop import sum_over_parts
      >>> total = lambda part, key: part.sum()
      >>> print(sum_over_parts(total, jnp.arange(6.0), jax.random.key(0), 2))
      15.0
    """
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
    keys = jax.random.split(key, len(jax.tree.leaves(parts)[0]))
    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *first))

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, function(*inputs)), None

    return jax.lax.scan(add, zero, (parts, keys))[0]


def with_synapses(report: Epoch, start: Carry, end: Carry) -> Epoch:
    """What Synaptic Intelligence and EWC, if they are there, say of an epoch."""
    if state.find_memories(end.opt_state):
        penalty = si_jax.surrogate_loss(end.opt_state, end.params)
        report = report._replace(surrogate_loss=penalty)
    if not transform.find_synaptic(end.opt_state):
        return report

    def total(path_integral):
        sums = jax.tree.map(jnp.sum, path_integral)
        return sum(jax.tree.leaves(sums), jnp.zeros(()))

    before, after = (si_jax.synapses(carry.opt_state) for carry in (start, end))
    omega = jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(after.path_integral))))
    largest = [x.max() for x in jax.tree.leaves(after.importance)]
    # ω runs on through a task: the difference is this epoch's.
    return report._replace(
        path_integral=total(after.path_integral) - total(before.path_integral),
        negative=jnp.mean(omega < 0, dtype=jnp.float32),
        importance=jnp.stack(largest).max(),
    )


def epoch_key(
    key: jax.Array, task: jax.Array | int, epoch: jax.Array | int
) -> jax.Array:
    """The key of a run's epoch, the same for every driver."""
    return jax.random.fold_in(jax.random.fold_in(key, task + 1), epoch)


def init_key(key: jax.Array) -> jax.Array:
    """The key of a run's initial parameters, unlike that of any epoch."""
    return jax.random.fold_in(key, 0)


def permutations_key(key: jax.Array) -> jax.Array:
    """The key of a run's pixel permutations, unlike any other of its keys."""
    return jax.random.fold_in(key, 2**32 - 1)


def correlations(carry: Carry) -> dict[str, jax.Array]:
    """Fig. 5: correlations of ω between the tasks that ``carry`` remembers.

    Returns:
      ``(tasks, tasks)`` for each of the parameters that is a matrix at least, by name.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.training.loop import Carry, correlations
      >>> omega = {"kernel": jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])}  # two tasks'
      >>> print(correlations(Carry(None, None, omega))["kernel"].round(3))
      [[ 1. -1.]
       [-1.  1.]]
    """
    leaves = jax.tree_util.tree_leaves_with_path(carry.path_integrals)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): metrics.correlation(
            x.reshape(len(x), -1)
        )
        for path, x in leaves
        if x.ndim > 2
    }


def train(
    learner: Learner,
    key: jax.Array,
    train_examples: AnyExamples,
    test_examples: AnyExamples,
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

    Example:
      >>> import jax, numpy as np, optax, si_jax
      >>> from experiments import data
      >>> from experiments.data import tasks
      >>> from experiments.networks import models
      >>> from experiments.training.boundaries import consolidate, reset
      >>> from experiments.training.classifier import learner
      >>> from experiments.training.loop import train
      >>> labels = np.arange(80, dtype=np.int32) % 4
      >>> images = np.zeros((80, 4), np.uint8)
      >>> images[np.arange(80), labels] = 255  # each class lights a pixel of its own
      >>> examples = data.Examples(images.reshape(80, 2, 2, 1), labels)
      >>> pairs = tasks.split_classes(labels, [(0, 1), (2, 3)], outputs=4)
      >>> tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1))
      >>> pieces = learner(
      ...     models.MLP((16,), 4),
      ...     tx,
      ...     (2, 2, 1),
      ...     batch_size=8,
      ...     boundary=[consolidate, reset(tx)],
      ... )
      >>> result = train(
      ...     pieces, jax.random.key(0), examples, examples, pairs, pairs, epochs=10
      ... )
      >>> print(result.test)
      [[1.  0.5]
       [1.  1. ]]
    """
    carry = learner.init(init_key(key))
    initial = learner.evaluate(carry, test_examples, test_tasks)

    def one_task(carry, inputs):
        number, task = inputs

        def one_epoch(carry, i):
            return learner.epoch(carry, train_examples, task, epoch_key(key, number, i))

        carry, reports = jax.lax.scan(one_epoch, carry, jnp.arange(epochs))
        # The key behind the last epoch's, as the driver of long runs has it.
        end = epoch_key(key, number, epochs)
        carry = learner.finish(carry, train_examples, task, end)
        test = learner.evaluate(carry, test_examples, test_tasks)
        train = learner.evaluate(carry, train_examples, train_tasks)
        return carry, (test, train, reports)

    numbers = jnp.arange(len(train_tasks.size))
    _, (test, train, reports) = jax.lax.scan(one_task, carry, (numbers, train_tasks))
    return Result(test, train, initial, reports)
