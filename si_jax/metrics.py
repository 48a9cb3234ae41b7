"""Measures of continual learning, from the matrix of accuracies.

Row i, column j of an accuracy matrix: the accuracy on task j after training on task i.
Leading axes (seeds, say) are kept. Accuracies on tasks that were not seen yet may be
NaN, where a measure does not ask for them; it is NaN itself where one that it asks for
is. A matrix that has another shape is a ``ValueError``.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def average_accuracy(matrix: ArrayLike) -> jax.Array:
    """Accuracy averaged over all tasks after the last one.

    ACC of Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", 2017.

    Args:
      matrix: ``(…, stages, tasks)``, accuracy on each task (columns) after each stage
        (rows), of which the last counts.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.average_accuracy([[1.0, 0.5], [0.5, 1.0]]))
      0.75
    """
    return _table(matrix, square=False)[..., -1, :].mean(-1)


def average_accuracy_so_far(matrix: ArrayLike) -> jax.Array:
    """Accuracy after each task, averaged over the tasks up to it.

    Figs. 3 and 4 of Zenke et al., 2017; A of Chaudhry et al., 2018. Its mean over time
    is the average incremental accuracy of Rebuffi et al., "iCaRL", 2017.

    Args:
      matrix: ``(…, tasks, tasks)``, accuracy on each task (columns) after each (rows).

    Returns:
      ``(…, tasks)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.average_accuracy_so_far([[1.0, 0.5], [0.5, 1.0]]))
      [1.   0.75]
    """
    matrix = _table(matrix)
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
    return jnp.diagonal(_table(matrix), axis1=-2, axis2=-1).mean(-1)


def forgetting(matrix: ArrayLike) -> jax.Array:
    """How far each task but the last fell from its best, averaged.

    F of Chaudhry et al., "Riemannian Walk for Incremental Learning", 2018: the best is
    taken over the rows from the first to the last but one, where there is a number:
    not over those in which the task is NaN, not seen yet. (Avalanche's forgetting is
    taken from the accuracy right after the task, and so is minus
    :func:`backward_transfer`; Mammoth's counts the last row, too, and is never
    negative.)

    Args:
      matrix: ``(…, tasks, tasks)`` with at least two tasks.

    Returns:
      ``(…)``; negative if the tasks went on improving.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.forgetting([[1.0, 0.5], [0.5, 1.0]]))
      0.5
    """
    matrix = _table(matrix, least=2)
    best = jnp.nanmax(matrix[..., :-1, :-1], axis=-2)
    return (best - matrix[..., -1, :-1]).mean(-1)


def backward_transfer(matrix: ArrayLike) -> jax.Array:
    """Accuracy after the last task minus that right after each, without the last.

    BWT of Lopez-Paz & Ranzato, 2017; negative where tasks are forgotten. (That of
    Díaz-Rodríguez et al., "Don't forget, there is more than forgetting", 2018, is over
    all pairs of a task and a later one.)

    Args:
      matrix: ``(…, tasks, tasks)`` with at least two tasks.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.backward_transfer([[1.0, 0.5], [0.5, 1.0]]))
      -0.5
    """
    matrix = _table(matrix, least=2)
    learned = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return (matrix[..., -1, :-1] - learned[..., :-1]).mean(-1)


def forward_transfer(matrix: ArrayLike, initial: ArrayLike) -> jax.Array:
    """Accuracy on each task right before it is trained, minus the untrained net's.

    FWT of Lopez-Paz & Ranzato, 2017, averaged over the tasks but the first. (That of
    Díaz-Rodríguez et al., 2018, is over all tasks to come, and not less the untrained
    net's, so that chance counts.)

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
    matrix = _table(matrix, least=2)
    before = jnp.diagonal(matrix, offset=1, axis1=-2, axis2=-1)
    return (before - _row(initial, matrix, "initial")[..., 1:]).mean(-1)


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
    matrix = _table(matrix)
    learned = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return (_row(reference, matrix, "reference") - learned).mean(-1)


def standard_error(values: ArrayLike) -> jax.Array:
    """Standard error of the mean over the first axis; NaN for a single value.

    Args:
      values: ``(n, …)``, one at least.

    Returns:
      ``(…)``.

    Example:
      >>> from si_jax import metrics
      >>> print(metrics.standard_error([1.0, 3.0]))
      1.0
    """
    values = _floats(values)
    if not values.ndim or not len(values):
        raise ValueError("a standard error needs a first axis of one value at least.")
    if len(values) == 1:  # one value says nothing of the spread
        return jnp.full_like(values[0], jnp.nan)
    return values.std(0, ddof=1) / jnp.sqrt(jnp.asarray(len(values), values.dtype))


def correlation(vectors: ArrayLike) -> jax.Array:
    """Pearson correlations between the rows: Fig. 5 of Zenke et al., 2017, of their ω.

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
    rows = _floats(vectors)
    rows = rows - rows.mean(-1, keepdims=True)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows @ rows.mT


def _table(matrix: ArrayLike, *, square: bool = True, least: int = 1) -> jax.Array:
    """A matrix of accuracies with a row and a column a task, so many at least."""
    table = _floats(matrix)
    if table.ndim < 2 or 0 in table.shape[-2:]:
        raise ValueError(f"accuracies are (…, tasks, tasks), not {table.shape}.")
    rows, columns = table.shape[-2:]
    if square and rows != columns:
        raise ValueError(
            f"accuracies must have a row after each task and a column on each, got "
            f"{rows} rows and {columns} columns: without a row before the first task "
            "(forward_transfer takes it as initial) and without tasks to come."
        )
    if columns < least:
        raise ValueError(f"this measure needs {least} tasks at least, got {columns}.")
    return table


def _row(values: ArrayLike, matrix: jax.Array, name: str) -> jax.Array:
    """Accuracies on each of the matrix' tasks."""
    row = _floats(values)
    if row.shape[-1:] != matrix.shape[-1:]:
        raise ValueError(
            f"{name} must have an accuracy for each of {matrix.shape[-1]} tasks, got "
            f"{row.shape}."
        )
    return row


def _floats(values: ArrayLike) -> jax.Array:
    """Numbers as they are; whole ones, percent say, as floats."""
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "these are not numbers in rows of equal length; NaN stands for tasks that "
            f"were not seen yet. ({error})"
        ) from error
    floating = jnp.issubdtype(array.dtype, jnp.inexact)
    return array if floating else array.astype(jnp.result_type(float))
