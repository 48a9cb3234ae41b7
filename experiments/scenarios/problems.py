"""Split MNIST in the three scenarios, to choose on and to test on."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, split_mnist
from experiments.data import tasks
from experiments.data.datasets import Examples
from experiments.engine.run import Problem
from experiments.scenarios.config import Config, Scenario

TRAIN_EVALUATED = 1000  # of each task's training examples, to evaluate on


class Problems(NamedTuple):
    """Split MNIST to choose on and to test on, in arrays of the same shapes."""

    choice: Problem
    test: Problem


def make_problems(config: Config) -> Problems:
    """The five pairs of digits, each with outputs of its own."""
    digits = data.load("mnist", config.data, config.data_dir)
    held = data.hold_out(digits, config.held_out)
    # What is held out stays behind the rest: as many images, one compiled program.
    images, labels = (
        np.concatenate(x) for x in zip(held.train, held.test, strict=True)
    )
    rows = [
        tasks.split_classes(labels, split_mnist.GROUPS, digits.classes)
        for labels in (
            held.train.labels,
            digits.train.labels,
            held.test.labels,
            digits.test.labels,
        )
    ]
    longest = [max(x.rows.shape[1] for x in pair) for pair in (rows[:2], rows[2:])]
    choice, train, choice_test, test = map(tasks.padded, rows, np.repeat(longest, 2))
    evaluated = functools.partial(tasks.first, count=TRAIN_EVALUATED)
    choose_from = Examples(images, labels)
    return Problems(
        Problem(choose_from, held.test, evaluated(choice), choice_test, choice),
        Problem(digits.train, digits.test, evaluated(train), test, train),
    )


def in_scenario(scenario: Scenario, problem: Problem) -> Problem:
    """The pairs of digits as a scenario has them.

    Args:
      scenario: ``"task"``, where the outputs that take part are the pair's own;
        ``"domain"``, the same two for every pair, for its first and its second digit;
        ``"class"``, those of the pair and of all before it.
      problem: from :func:`make_problems`.
    """

    def with_classes(change: Callable[[jax.Array], jax.Array]) -> Problem:
        stacks = ("train_tasks", "test_tasks", "stages")
        changed = {name: getattr(problem, name) for name in stacks}
        return problem._replace(
            **{k: x._replace(classes=change(x.classes)) for k, x in changed.items()}
        )

    match scenario:
        case "task":
            return problem
        case "class":
            so_far = with_classes(lambda classes: jnp.cumsum(classes, axis=0) > 0)
            return so_far._replace(growing=True)
        case "domain":
            train, test = (
                examples._replace(labels=examples.labels % 2)
                for examples in (problem.train, problem.test)
            )
            both = with_classes(
                lambda classes: jnp.broadcast_to(classes[0], classes.shape)
            )
            return both._replace(train=train, test=test)
