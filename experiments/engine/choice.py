"""What is best on held-out data: the one way in which a strength is chosen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.engine import driver
from experiments.engine.command import UserError
from experiments.engine.record import Record
from experiments.engine.run import Run
from experiments.engine.tables import number
from si_jax import metrics

GRID_SEEDS = 1_000_000  # and from there on


def choose(scores: Any, what: str = "the grid") -> tuple[int, ...]:
    """Where the mean over the first axis, of the seeds, is largest.

    A point one of whose seeds diverged, NaN, is never chosen.

    Args:
      scores: ``(seeds, …)``, an axis for each of what is chosen.
      what: was tried, for the error.

    Returns:
      An index for each axis but the first.

    Raises:
      UserError: if all diverged.

    Example:
      >>> from experiments.engine.choice import choose
      >>> choose([[0.7, 0.9, float("nan")], [0.7, 0.8, 1.0]])
      (1,)
    """
    mean = np.asarray(scores, np.float64).mean(0)
    finite = np.isfinite(mean)
    if not finite.any():
        raise UserError(
            f"{what} diverged in all that was tried: there is nothing to choose from. "
            "Lower the learning rate, or try other values, with another --out."
        )
    best = np.where(finite, mean, -np.inf).argmax()
    return tuple(map(int, np.unravel_index(best, mean.shape)))


def chosen(run: Run, strengths: Sequence[float], seeds: int, record: Record) -> float:
    """The strength that is best on held-out data, by ``seeds`` runs of each.

    Their seeds are their own, so that those of the test are fresh.
    """
    grid = dataclasses.replace(
        run,
        label=dataclasses.replace(run.label, role="grid"),
        seeds=range(GRID_SEEDS, GRID_SEEDS + seeds),
    )
    accuracy = driver.run_grid(grid, {"strength": strengths}, record)
    (index,) = choose(metrics.average_accuracy(accuracy), grid.name)
    return strengths[index]


def choices(accuracy: np.ndarray) -> list[str]:
    """A cell a strength of ``(seeds, strengths)``: the mean, the best with a ``*``."""
    cells = [f"{number(x)} " for x in accuracy.mean(axis=0)]
    (chosen,) = choose(accuracy)
    cells[chosen] = cells[chosen].replace(" ", "*")
    return cells
