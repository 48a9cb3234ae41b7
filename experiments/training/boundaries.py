"""Between two tasks: functions ``(carry, examples, task, key) → carry``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import si_jax
from experiments.data.tasks import Task, look_up, mask_logits, shuffle
from experiments.training.loop import AnyExamples, Boundary, Carry, Model
from si_jax import ewc, importance, kronecker, state


def consolidate(
    carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
) -> Carry:
    """A :data:`Boundary`: :func:`si_jax.consolidate`, eq. 5."""
    del examples, task, key
    opt_state = si_jax.consolidate(carry.opt_state, carry.params)
    return carry._replace(opt_state=opt_state)


def consolidate_importance(
    measure: Callable[[optax.Params, jax.Array, jax.Array, jax.Array], Any],
    count: int,
    merge: Callable[[optax.OptState, optax.Params, Any], optax.OptState] = (
        ewc.consolidate
    ),
) -> Boundary:
    """Consolidate an importance that is measured at the task's end.

    Args:
      measure: ``(params, images, classes, key) → importance``.
      count: how many of the task's examples to give it, at random; if the task has
        fewer, they are taken again.
      merge: ``(opt_state, params, importance) → opt_state``: what takes it into the
        optimizer's memory.

    Returns:
      A :data:`Boundary` for an optimizer with
      :func:`si_jax.ewc.elastic_weight_consolidation`, or what ``merge`` is for.
    """

    def boundary(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        order_key, measure_key = jax.random.split(key)
        order = shuffle(task, order_key)
        images, _ = look_up(examples, order[jnp.arange(count) % task.size])
        params, opt_state, _ = carry
        omega = measure(params, images, task.classes, measure_key)
        return carry._replace(opt_state=merge(opt_state, params, omega))

    return boundary


def consolidate_fisher(model: Model, count: int) -> Boundary:
    """EWC: :func:`consolidate_importance` with the Fisher information."""

    def measure(params, images, classes, key):
        return importance.fisher(_logits_of(model, classes), params, images, key)

    return consolidate_importance(measure, count)


def consolidate_kronecker(model: Model, count: int) -> Boundary:
    """:func:`consolidate_importance` with the Fisher information's Kronecker factors.

    It is for an optimizer with :func:`si_jax.kronecker.kronecker_consolidation`, made
    with :func:`kronecker_factors`.
    """

    def measure(params, images, classes, key):
        return importance.kronecker(_logits_of(model, classes), params, images, key)

    return consolidate_importance(measure, count, kronecker.consolidate)


def kronecker_factors(model: Model, image_shape: tuple[int, ...]) -> kronecker.Factors:
    """The shapes of a network's factors; computes nothing."""
    key, images = jax.random.key(0), jnp.zeros((1, *image_shape))

    def measure():
        params = model.init(key, images)
        logits = _logits_of(model, jnp.array(True))
        return importance.kronecker(logits, params, images, key)

    return jax.eval_shape(measure)


def _logits_of(
    model: Model, classes: jax.Array
) -> Callable[[optax.Params, jax.Array], jax.Array]:
    """Of one image, of the classes that take part."""

    def logits(params, image):
        return mask_logits(model.apply(params, image[None]), classes)[0]

    return logits


def consolidate_second_moment(
    batch_size: int, power: float = 1.0, b2: float = 0.999
) -> Boundary:
    """EWC with what Adam has kept, :func:`si_jax.importance.second_moment`: no pass.

    It belongs before :func:`reset`.
    """

    def boundary(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        del examples, task, key
        params, opt_state, _ = carry
        kept = importance.second_moment(
            opt_state, b2=b2, batch_size=batch_size, power=power
        )
        return carry._replace(opt_state=ewc.consolidate(opt_state, params, kept))

    return boundary


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


def merge(weight: float) -> Boundary:
    """From the second task on, go back between θ̃ and the parameters.

    Args:
      weight: of the parameters; of :func:`si_jax.merge`.

    Returns:
      A :data:`Boundary`, to stand before the one that consolidates.
    """

    def boundary(
        carry: Carry, examples: AnyExamples, task: Task, key: jax.Array
    ) -> Carry:
        del examples, task, key
        params, opt_state, _ = carry
        (memory,) = state.find_memories(opt_state)
        held = [jnp.any(x > 0) for x in jax.tree.leaves(state.remembered(memory)[0])]
        share = jnp.where(jnp.stack(held).any(), weight, 1.0)
        return carry._replace(params=si_jax.merge(opt_state, params, share))

    return boundary


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
