"""Tasks: which examples of a data set, and which of the network's outputs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Task(NamedTuple):
    """One classification task, or several of unequal size stacked along a first axis.

    Indices instead of copies: the images stay on the device once, whatever the tasks.

    Attributes:
      rows: int32 ``(capacity,)``, the task's examples in the data set; entries from
        ``size`` on are padding.
      size: int32 scalar, the number of examples.
      classes: bool ``(outputs,)``, the outputs that take part, in loss and argmax.
    """

    rows: jax.Array
    size: jax.Array
    classes: jax.Array


def split_classes(
    labels: ArrayLike, groups: Sequence[Sequence[int]], outputs: int
) -> Task:
    """One task for each group of classes, stacked: split MNIST, split CIFAR.

    Args:
      labels: int ``(examples,)``, the data set's labels.
      groups: the classes of each task.
      outputs: the number of the network's outputs.

    Returns:
      A :class:`Task` whose fields have a first axis over the groups.

    Raises:
      ValueError: if there are no groups, or a group has no examples or a class that is
        not an output.

    Example:
      >>> from si_jax import tasks
      >>> task = tasks.split_classes([0, 1, 2, 3, 2], [(0, 1), (2, 3)], outputs=4)
      >>> print(task.size, task.rows[1])
      [2 3] [2 3 4]
      >>> print(task.classes[1])
      [False False  True  True]
    """
    if not groups:
        raise ValueError("there must be at least one group of classes.")
    labels = np.asarray(labels)
    members = [np.flatnonzero(np.isin(labels, group)) for group in groups]
    sizes = [len(m) for m in members]
    classes = np.zeros((len(groups), outputs), bool)
    for row, group, size in zip(classes, groups, sizes, strict=True):
        if size == 0:
            raise ValueError(f"the data set has no examples of the classes {group}.")
        if not 0 <= min(group) <= max(group) < outputs:
            raise ValueError(f"classes {group} do not fit into {outputs} outputs.")
        row[list(group)] = True
    index = np.zeros((len(groups), max(sizes)), np.int32)
    for row, m in zip(index, members, strict=True):
        row[: len(m)] = m
    return Task(jnp.asarray(index), jnp.asarray(sizes, jnp.int32), jnp.asarray(classes))


def shuffle(task: Task, key: jax.Array) -> jax.Array:
    """A random order of one task's examples.

    Args:
      task: one task, not a stack of them.
      key: what the order is a function of.

    Returns:
      int32 ``(capacity,)``: ``task.rows``, shuffled, with the padding last.
    """
    positions = jnp.arange(task.rows.shape[-1], dtype=jnp.int32)
    rank = jax.random.bits(key, positions.shape, jnp.uint32) >> 1  # below any padding's
    rank = jnp.where(positions < task.size, rank, jnp.uint32(2**32 - 1))
    return task.rows[jnp.argsort(rank)]
