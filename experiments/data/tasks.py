"""Tasks: which examples of a data set, and which of the network's outputs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments.data.datasets import Examples


class PermutedExamples(NamedTuple):
    """A data set seen through several permutations of its pixels, one after the other.

    Of ``n`` images, row ``r`` is image ``r mod n`` through permutation ``r div n``:
    indices instead of copies of the images.

    Attributes:
      images: uint8 ``(n, height, width, channels)``.
      labels: int32 ``(n,)``.
      pixels: int32 ``(permutations, height · width · channels)``, the place in the
        image that each of the network's inputs is taken from.
    """

    images: jax.Array
    labels: jax.Array
    pixels: jax.Array


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
      groups: the classes of each task; an array ``(tasks, classes)`` will do.
      outputs: the number of the network's outputs.

    Returns:
      A :class:`Task` whose fields have a first axis over the groups.

    Raises:
      ValueError: if there are no groups, or a group has no examples or a class that is
        not an output.

    Example:
      >>> from experiments.data import tasks
      >>> task = tasks.split_classes([0, 1, 2, 3, 2], [(0, 1), (2, 3)], outputs=4)
      >>> print(task.size, task.rows[1])
      [2 3] [2 3 4]
      >>> print(task.classes[1])
      [False False  True  True]
    """
    groups = [[int(k) for k in group] for group in groups]
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
        row[group] = True
    # Padding is example 0: a row that can be looked up, and counts nowhere.
    index = np.zeros((len(groups), max(sizes)), np.int32)
    for row, m in zip(index, members, strict=True):
        row[: len(m)] = m
    return Task(jnp.asarray(index), jnp.asarray(sizes, jnp.int32), jnp.asarray(classes))


def permuted(examples: int, count: int, outputs: int) -> Task:
    """One task for each permutation of a data set's pixels, stacked: permuted MNIST.

    Args:
      examples: the number of the data set's images, all of which every task shows.
      count: the number of tasks.
      outputs: the number of the network's outputs, all of which take part.

    Returns:
      A :class:`Task` whose fields have a first axis over the permutations, to index
      :class:`PermutedExamples` of :func:`permute`.

    Example:
      >>> from experiments.data import tasks
      >>> print(tasks.permuted(3, 2, outputs=4).rows)
      [[0 1 2]
       [3 4 5]]
    """
    rows = np.arange(count * examples, dtype=np.int32).reshape(count, examples)
    size = np.full(count, examples, np.int32)
    classes = np.ones((count, outputs), bool)
    return Task(jnp.asarray(rows), jnp.asarray(size), jnp.asarray(classes))


def together(tasks: Task) -> Task:
    """One task of all the examples of several: joint training.

    Args:
      tasks: stacked tasks, not traced.

    Returns:
      A :class:`Task` whose fields have a first axis of length 1.

    Example:
      >>> from experiments.data import tasks
      >>> task = tasks.together(tasks.permuted(3, 2, outputs=4))
      >>> print(task.rows, task.size)
      [[0 1 2 3 4 5]] [6]
    """
    pairs = zip(np.asarray(tasks.rows), np.asarray(tasks.size), strict=True)
    rows = np.concatenate([rows[:size] for rows, size in pairs])
    return Task(
        jnp.asarray(rows[None]),
        jnp.asarray([len(rows)], jnp.int32),
        tasks.classes.any(0, keepdims=True),
    )


def padded(tasks: Task, capacity: int) -> Task:
    """The same tasks with more padding, to share a program with larger ones.

    Example:
      >>> from experiments.data import tasks
      >>> print(tasks.padded(tasks.permuted(2, 2, outputs=4), 3).rows)
      [[0 1 0]
       [2 3 0]]
    """
    more = capacity - tasks.rows.shape[-1]
    return tasks._replace(rows=jnp.pad(tasks.rows, ((0, 0), (0, more))))


def first(tasks: Task, count: int) -> Task:
    """The first ``count`` examples of each of several stacked tasks, or all it has.

    Example:
      >>> from experiments.data import tasks
      >>> print(tasks.first(tasks.permuted(3, 2, outputs=4), 2).rows)
      [[0 1]
       [3 4]]
    """
    return tasks._replace(
        rows=tasks.rows[:, :count], size=jnp.minimum(tasks.size, jnp.int32(count))
    )


def permute(examples: Examples, key: jax.Array, count: int) -> PermutedExamples:
    """See a data set through ``count`` permutations; the first leaves it as it is.

    Args:
      examples: the data set.
      key: what the permutations are a function of, whatever the examples: training and
        test set need the same.
      count: the number of permutations.

    Returns:
      A :class:`PermutedExamples`.

    Example:
      >>> import jax, numpy as np
      >>> from experiments import data
      >>> from experiments.data import tasks
      >>> images = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
      >>> one = data.Examples(images, np.zeros(1, np.int32))
      >>> print(tasks.permute(one, jax.random.key(1), 2).pixels)
      [[0 1 2 3]
       [3 2 0 1]]
    """
    places = jnp.arange(np.prod(examples.images.shape[1:]), dtype=jnp.int32)
    keys = jax.random.split(key, count)
    pixels = jax.vmap(jax.random.permutation, (0, None))(keys, places)
    return PermutedExamples(*examples, pixels.at[0].set(places))


def look_up(
    examples: Examples | PermutedExamples, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The images and labels that rows of a task stand for.

    Args:
      examples: a data set.
      rows: int32 ``(batch,)``.

    Returns:
      float32 images ``(batch, height, width, channels)`` in [0, 1] and int32 labels
      ``(batch,)``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from experiments import data
      >>> from experiments.data import tasks
      >>> images = np.array([0, 0, 255, 255], np.uint8).reshape(1, 2, 2, 1)
      >>> one = data.Examples(images, np.zeros(1, np.int32))
      >>> seen = tasks.permute(one, jax.random.key(1), 2)
      >>> found, labels = tasks.look_up(seen, jnp.array([0, 1]))
      >>> print(found.reshape(2, 4))
      [[0. 0. 1. 1.]
       [1. 1. 0. 0.]]
    """
    images, labels = jnp.asarray(examples.images), jnp.asarray(examples.labels)
    if isinstance(examples, PermutedExamples):
        permutation, rows = jnp.divmod(rows, jnp.int32(len(labels)))
        batch = images[rows].reshape(len(rows), -1)
        batch = jnp.take_along_axis(batch, examples.pixels[permutation], axis=1)
        batch = batch.reshape(-1, *images.shape[1:])
    else:
        batch = images[rows]
    return batch.astype(jnp.float32) / 255, labels[rows]


def shuffle(task: Task, key: jax.Array) -> jax.Array:
    """A random order of one task's examples.

    Args:
      task: one task, not a stack of them.
      key: what the order is a function of.

    Returns:
      int32 ``(capacity,)``: ``task.rows``, shuffled, with the padding last.

    Example:
      >>> import jax
      >>> from experiments.data import tasks
      >>> pair = tasks.split_classes([0, 1, 2, 3, 2], [(0, 1), (2, 3)], outputs=4)
      >>> first = jax.tree.map(lambda x: x[0], pair)  # 2 examples, 1 row of padding
      >>> print(sorted(tasks.shuffle(first, jax.random.key(0))[:2].tolist()))
      [0, 1]
    """
    positions = jnp.arange(task.rows.shape[-1], dtype=jnp.int32)
    rank = jax.random.bits(key, positions.shape, jnp.uint32) >> 1  # below any padding's
    rank = jnp.where(positions < task.size, rank, jnp.uint32(2**32 - 1))
    return task.rows[jnp.argsort(rank)]


def mask_logits(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Multi-head readout: the logits of classes that take no part become −∞.

    Args:
      logits: ``(…, outputs)``.
      classes: bool ``(outputs,)``.

    Returns:
      ``(…, outputs)``, the dtype of ``logits``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from experiments.data.tasks import mask_logits
      >>> logits, classes = jnp.array([3.0, 1.0, 1.0]), jnp.array([False, True, True])
      >>> print(jax.nn.softmax(mask_logits(logits, classes)))
      [0.  0.5 0.5]
    """
    return jnp.where(jnp.broadcast_to(classes, logits.shape), logits, -jnp.inf)
