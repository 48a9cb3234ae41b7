"""Measures of continual learning, from the matrix of accuracies.

Row i, column j of an accuracy matrix: the accuracy on task j after training on task i.
Leading axes (seeds, say) are kept.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def average_accuracy(matrix: ArrayLike) -> jax.Array:
    """Accuracy averaged over all tasks after the last one.

    ACC of Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", 2017.

    Args:
      matrix: ``(…, tasks, tasks)``, accuracy on each task (columns) after each (rows).

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.average_accuracy([[1.0, 0.5], [0.5, 1.0]]))
      0.75
    """
    return jnp.asarray(matrix)[..., -1, :].mean(-1)


def average_accuracy_so_far(matrix: ArrayLike) -> jax.Array:
    """Accuracy after each task, averaged over the tasks up to it: Figs. 3 and 4.

    Args:
      matrix: ``(…, tasks, tasks)``, accuracy on each task (columns) after each (rows).

    Returns:
      ``(…, tasks)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.average_accuracy_so_far([[1.0, 0.5], [0.5, 1.0]]))
      [1.   0.75]
    """
    matrix = jnp.asarray(matrix)
    seen = jnp.tril(matrix).sum(-1)
    count = jnp.arange(1, matrix.shape[-1] + 1, dtype=matrix.dtype)
    return seen / jnp.broadcast_to(count, seen.shape)


def learning_accuracy(matrix: ArrayLike) -> jax.Array:
    """Accuracy on each task right after training on it, averaged.

    LA of Riemer et al., "Learning to Learn without Forgetting by Maximizing Transfer
    and Minimizing Interference", 2019.

    Args:
      matrix: ``(…, tasks, tasks)``, accuracy on each task (columns) after each (rows).

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.learning_accuracy([[1.0, 0.5], [0.5, 1.0]]))
      1.0
    """
    return jnp.diagonal(jnp.asarray(matrix), axis1=-2, axis2=-1).mean(-1)


def forgetting(matrix: ArrayLike) -> jax.Array:
    """How far each task but the last fell from its best, averaged.

    F of Chaudhry et al., "Riemannian Walk for Incremental Learning", 2018: the best is
    taken over the rows from the first to the last but one. (Avalanche's forgetting is
    taken from the accuracy right after the task, and so is minus
    :func:`backward_transfer`.)

    Args:
      matrix: ``(…, tasks, tasks)`` with at least two tasks.

    Returns:
      ``(…)``; negative if the tasks went on improving.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.forgetting([[1.0, 0.5], [0.5, 1.0]]))
      0.5
    """
    matrix = jnp.asarray(matrix)
    best = matrix[..., :-1, :-1].max(-2)
    return (best - matrix[..., -1, :-1]).mean(-1)


def backward_transfer(matrix: ArrayLike) -> jax.Array:
    """Accuracy after the last task minus that right after each, without the last.

    BWT of Lopez-Paz & Ranzato, 2017; negative where tasks are forgotten.

    Args:
      matrix: ``(…, tasks, tasks)`` with at least two tasks.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.backward_transfer([[1.0, 0.5], [0.5, 1.0]]))
      -0.5
    """
    matrix = jnp.asarray(matrix)
    learned = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return (matrix[..., -1, :-1] - learned[..., :-1]).mean(-1)


def forward_transfer(matrix: ArrayLike, initial: ArrayLike) -> jax.Array:
    """Accuracy on each task right before it is trained, minus the untrained net's.

    FWT of Lopez-Paz & Ranzato, 2017, averaged over the tasks but the first.

    Args:
      matrix: ``(…, tasks, tasks)`` with at least two tasks.
      initial: ``(…, tasks)``, accuracy of the network before any training.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.forward_transfer([[1.0, 0.75], [0.5, 1.0]], [0.5, 0.5]))
      0.25
    """
    before = jnp.diagonal(jnp.asarray(matrix), offset=1, axis1=-2, axis2=-1)
    return (before - jnp.asarray(initial)[..., 1:]).mean(-1)


def intransigence(matrix: ArrayLike, reference: ArrayLike) -> jax.Array:
    """How far learning in turn falls short of learning each task with all before it.

    I of Chaudhry et al., 2018: a reference's accuracy on each task minus that right
    after training on it, averaged. Their reference is trained on the task and all those
    before it at once; one trained on all tasks is a stand-in where there is no other.

    Args:
      matrix: ``(…, tasks, tasks)``, accuracy on each task (columns) after each (rows).
      reference: ``(…, tasks)``, the reference's accuracy on each task.

    Returns:
      ``(…)``; negative where the tasks before are a hindrance to the reference.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.intransigence([[1.0, 0.5], [0.5, 0.5]], [1.0, 1.0]))
      0.25
    """
    learned = jnp.diagonal(jnp.asarray(matrix), axis1=-2, axis2=-1)
    return (jnp.asarray(reference) - learned).mean(-1)


def standard_error(values: ArrayLike) -> jax.Array:
    """Standard error of the mean over the first axis; NaN for a single value.

    Args:
      values: ``(n, …)``.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.standard_error([1.0, 3.0]))
      1.0
    """
    values = jnp.asarray(values)
    if len(values) == 1:  # one value says nothing of the spread
        return jnp.full_like(values[0], jnp.nan)
    return values.std(0, ddof=1) / jnp.sqrt(jnp.asarray(len(values), values.dtype))


def correlation(vectors: ArrayLike) -> jax.Array:
    """Pearson correlations between the rows: Fig. 5, of the tasks' ω.

    Args:
      vectors: ``(…, tasks, n)``.

    Returns:
      ``(…, tasks, tasks)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.correlation([[1.0, 2.0], [3.0, 7.0], [2.0, 1.0]]).round())
      [[ 1.  1. -1.]
       [ 1.  1. -1.]
       [-1. -1.  1.]]
    """
    rows = jnp.asarray(vectors)
    rows = rows - rows.mean(-1, keepdims=True)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows @ rows.mT
