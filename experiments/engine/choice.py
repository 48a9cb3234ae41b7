"""The strength that is best on held-out data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.engine import driver
from experiments.engine.programs import Problem
from experiments.engine.record import Record
from experiments.engine.tables import best, number
from experiments.training.loop import Learner
from si_jax import metrics

GRID_SEEDS = 1_000_000  # from here on, so that the seeds of the test are fresh


def chosen(
    config: Any,
    grid: str,
    make_learner: Callable[..., Learner],
    make_problem: Callable[[], Problem],
    record: Record,
    strengths: Sequence[float],
    further: Mapping[str, float],
) -> float:
    """The strength that is best on held-out data, by runs with seeds of their own."""
    accuracy = driver.run_grid(
        config,
        grid,
        make_learner,
        make_problem,
        record,
        range(GRID_SEEDS, GRID_SEEDS + config.grid_seeds),
        {
            "strength": strengths,
            "damping": [config.damping],
            **{key: [value] for key, value in further.items()},
        },
    )
    after = np.asarray(metrics.average_accuracy(accuracy))
    return strengths[choose(after.reshape(config.grid_seeds, -1), grid)]


def choose(accuracy: np.ndarray, grid: str = "the grid") -> int:
    """The strength of the best mean: ``(seeds, strengths)`` to an index.

    One of whose seeds diverged is not chosen.
    """
    return best(accuracy.mean(axis=0), grid)


def choices(accuracy: np.ndarray) -> list[str]:
    """A cell a strength of ``(seeds, strengths)``: the mean, the best with a ``*``."""
    cells = [f"{number(x)} " for x in accuracy.mean(axis=0)]
    chosen = choose(accuracy)
    cells[chosen] = cells[chosen].replace(" ", "*")
    return cells
