"""A run over a sequence of tasks, as pure functions of arrays.

:func:`learner` makes the pieces, which a driver calls one epoch at a time;
:func:`train` is the whole run as one function, to ``jit``, ``vmap`` or ``pmap``. Both
give the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import si_jax
from experiments.data.images import Examples
from experiments.data.tasks import PermutedExamples, Task, look_up, shuffle
from experiments.networks.models import mask_logits
from si_jax import ewc, importance, metrics, state, transform

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
    if micro_batch and batch_size % micro_batch:
        raise ValueError(
            f"micro_batch must divide the batch size {batch_size}, got {micro_batch}."
        )

    def init(key: jax.Array) -> Carry:
        params = model.init(key, jnp.zeros((1, *image_shape)))
        return Carry(params, tx.init(params))

    def finish(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        for step in boundary:
            carry = step(carry, examples, task, key)
        return carry

    return Learner(
        init,
        _epoch_of(model, tx, batch_size, dropout, micro_batch),
        finish,
        _evaluate_of(model, micro_batch or 1000),
    )


# --- Between two tasks ----------------------------------------------------------------


def consolidate(
    carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
) -> Carry:
    """A :data:`Boundary`: :func:`si_jax.consolidate`, eq. 5."""
    del examples, task, key
    opt_state = si_jax.consolidate(carry.opt_state, carry.params)
    return carry._replace(opt_state=opt_state)


def consolidate_importance(
    measure: Callable[[optax.Params, jax.Array, jax.Array, jax.Array], optax.Params],
    count: int,
) -> Boundary:
    """Consolidate an importance that is measured at the task's end.

    Args:
      measure: ``(params, images, classes, key) → importance``, a tree like ``params``.
      count: how many of the task's examples to give it, at random; if the task has
        fewer, they are taken again.

    Returns:
      A :data:`Boundary` for an optimizer with
      :func:`si_jax.ewc.elastic_weight_consolidation`.
    """

    def boundary(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        order_key, own_key = jax.random.split(key)
        order = shuffle(task, order_key)
        images, _ = look_up(examples, order[jnp.arange(count) % task.size])
        params, opt_state, _ = carry
        found = measure(params, images, task.classes, own_key)
        return carry._replace(opt_state=ewc.consolidate(opt_state, params, found))

    return boundary


def consolidate_fisher(model: Model, count: int) -> Boundary:
    """EWC: :func:`consolidate_importance` with the Fisher information."""

    def measure(params, images, classes, key):
        def logits(params, image):
            return mask_logits(model.apply(params, image[None]), classes)[0]

        return importance.fisher(logits, params, images, key)

    return consolidate_importance(measure, count)


def consolidate_sensitivity(model: Model, count: int) -> Boundary:
    """MAS: :func:`consolidate_importance` with the sensitivity of the outputs.

    Of those that take part in the task; it is summed over the tasks with ``decay=1`` of
    :func:`si_jax.ewc.elastic_weight_consolidation`.
    """

    def measure(params, images, classes, _):
        def outputs(params, image):
            return jnp.where(classes, model.apply(params, image[None])[0], 0)

        return importance.sensitivity(outputs, params, images)

    return consolidate_importance(measure, count)


def reset(tx: optax.GradientTransformation, *, keep_count: bool = False) -> Boundary:
    """Start every task with a fresh optimizer; what SI and EWC remember is kept.

    Args:
      tx: the optimizer.
      keep_count: keep its step count, of which it must have one, as the authors' code
        does. Adam's bias correction then takes the zeroed moments for old ones: after a
        long task, step t of the next is (1 − β₁ᵗ)/√(1 − β₂ᵗ) times as large as a fresh
        optimizer's, up to 6.6 times.

    Returns:
      A :data:`Boundary`.
    """

    def boundary(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        del examples, task, key
        params, opt_state, _ = carry
        if state.find_memories(opt_state):
            fresh = si_jax.reset_optimizer(tx, opt_state, params)
        else:
            fresh = tx.init(params)
        if keep_count:
            fresh = optax.tree.set(fresh, count=optax.tree.get(opt_state, "count"))
        return carry._replace(opt_state=fresh)

    return boundary


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
        kept = jax.tree.map(
            lambda old, new: jnp.concatenate([old[1:], new[None]]),
            carry.path_integrals,
            si_jax.synapses(carry.opt_state).path_integral,
        )
        carry = carry._replace(path_integrals=kept)
        return learner.finish(carry, examples, task, key)

    return learner._replace(init=init, finish=finish)


# --- Within a task --------------------------------------------------------------------


def _gather(
    examples: AnyExamples, task: Task, order: jax.Array, i: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch i: images, labels, and 1 or 0 for what is there or beyond the end."""
    positions = i * size + jnp.arange(size, dtype=jnp.int32)
    rows = order.at[positions].get(mode="clip")
    there = (positions < task.size).astype(jnp.float32)
    return *look_up(examples, rows), there


def _loss_of(model: Model) -> Callable[..., tuple[jax.Array, tuple[Any, Any]]]:
    """A batch's summed loss over ``count``; besides, the sums of losses and hits."""

    def loss(params, count, classes, images, labels, there, **rngs):
        out = mask_logits(model.apply(params, images, **rngs), classes)
        losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
        correct = (out.argmax(-1) == labels).astype(jnp.float32)
        # The padding's label may be masked, its loss infinite: no product will do.
        total = jnp.sum(jnp.where(there > 0, losses, 0))
        return total / count, (total, jnp.sum(correct * there))

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
        order_key, dropout_key = jax.random.split(key) if dropout else (key, key)
        order = shuffle(task, order_key)

        def step(i, running):
            (params, opt_state), seen = running
            batch = _gather(examples, task, order, i, batch_size)
            key = jax.random.fold_in(dropout_key, i)
            grads, new = gradient(params, task.classes, batch, key)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), jax.tree.map(jnp.add, seen, new)

        steps = (task.size + batch_size - 1) // batch_size
        zero = jnp.zeros(())
        (params, opt_state), (total, correct) = jax.lax.fori_loop(
            0, steps, step, ((carry.params, carry.opt_state), (zero, zero))
        )
        end = carry._replace(params=params, opt_state=opt_state)
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
                images, labels, there = _gather(examples, task, task.rows, i, size)
                out = mask_logits(model.apply(carry.params, images), task.classes)
                # Of no numbers the largest would be the first.
                hits = if_finite(out.max(-1), out.argmax(-1) == labels)
                return correct + jnp.sum(jnp.where(there > 0, hits, 0))

            batches = (task.size + size - 1) // size
            correct = jax.lax.fori_loop(0, batches, count, jnp.zeros(()))
            return correct / task.size.astype(jnp.float32)

        return jax.lax.map(accuracy, tasks)

    return evaluate


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
      >>> from experiments.training.loop import consolidate, learner, reset, train
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
        end = epoch_key(key, number, epochs)
        carry = learner.finish(carry, train_examples, task, end)
        test = learner.evaluate(carry, test_examples, test_tasks)
        train = learner.evaluate(carry, train_examples, train_tasks)
        return carry, (test, train, reports)

    numbers = jnp.arange(len(train_tasks.size))
    _, (test, train, reports) = jax.lax.scan(one_task, carry, (numbers, train_tasks))
    return Result(test, train, initial, reports)
