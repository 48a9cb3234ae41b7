"""Labelled images as arrays, and what is done with a whole data set."""

from typing import Any, NamedTuple

import numpy as np


class DataError(Exception):
    """The data cannot be had; the message says what to do."""


class Examples(NamedTuple):
    """Labelled images.

    Attributes:
      images: uint8, ``(examples, height, width, channels)``.
      labels: int32, ``(examples,)``.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """A data set under its own name.

    Attributes:
      name: what it is: ``mnist``, ``mnist5k``, ``cifar10`` or ``cifar100``.
      classes: how many classes the labels run over.
      train: the training examples.
      test: the test examples.
    """

    name: str
    classes: int
    train: Examples
    test: Examples


def select(dataset: Dataset, classes: int) -> Dataset:
    """The examples of a data set's first ``classes`` classes.

    Example:
      >>> from experiments import data
      >>> pair = data.select(data.load("mnist", "mnist5k"), 2)
      >>> print(pair.classes, sorted(set(pair.train.labels.tolist())))
      2 [0, 1]
    """

    def first(examples: Examples) -> Examples:
        rows = examples.labels < classes
        return Examples(examples.images[rows], examples.labels[rows])

    return dataset._replace(
        classes=classes, train=first(dataset.train), test=first(dataset.test)
    )


def join(first: Dataset, second: Dataset) -> Dataset:
    """Two data sets as one, the second one's labels after the first one's.

    Args:
      first: a data set.
      second: another, of images of the same shape.

    Returns:
      A :class:`Dataset`, named after both.

    Example:
      >>> from experiments import data
      >>> digits = data.load("mnist", "mnist5k")
      >>> twice = data.join(digits, digits)
      >>> print(twice.name, twice.classes, twice.train.labels.max())
      mnist5k+mnist5k 20 19
    """

    def both(a: Examples, b: Examples) -> Examples:
        return Examples(
            np.concatenate([a.images, b.images]),
            np.concatenate([a.labels, b.labels + np.int32(first.classes)]),
        )

    return Dataset(
        f"{first.name}+{second.name}",
        first.classes + second.classes,
        both(first.train, second.train),
        both(first.test, second.test),
    )


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """A random part of the training set, always the same, in the test set's place.

    Args:
      dataset: from :func:`load`.
      fraction: of the training examples, to evaluate on; 0 leaves the data set alone.

    Returns:
      A :class:`Dataset`, to choose hyperparameters on.

    Raises:
      DataError: if either part would be empty.
      ValueError: if ``fraction`` is not in [0, 1).

    Example:
      >>> from experiments import data
      >>> digits = data.hold_out(data.load("mnist", "mnist5k"), 0.25)
      >>> print(len(digits.train.labels), len(digits.test.labels))
      3000 1000
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}.")
    if not fraction:
        return dataset
    images, labels = dataset.train
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.split(order, [round(fraction * len(labels))])
    if not min(len(held), len(rest)):
        raise DataError(
            f"Holding out {fraction} of {len(labels)} examples leaves none to train on "
            "or none to evaluate on."
        )
    train, test = (Examples(images[rows], labels[rows]) for rows in (rest, held))
    return dataset._replace(train=train, test=test)
