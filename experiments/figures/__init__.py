"""The figures of the paper, and of what is measured besides."""

from experiments.figures.accuracy import (
    accuracy_by_task,
    average_accuracy,
    correlations,
    diagnosis,
    final_accuracy,
    frontier,
    heat_map,
    ratios,
    scenarios,
)
from experiments.figures.style import COLOURS, METHODS
from experiments.figures.theory import (
    by_batch_size,
    importances,
    pairs,
    quadratic,
    surrogate,
    trajectories,
)

__all__ = [
    "COLOURS",
    "METHODS",
    "accuracy_by_task",
    "average_accuracy",
    "by_batch_size",
    "correlations",
    "diagnosis",
    "final_accuracy",
    "frontier",
    "heat_map",
    "importances",
    "pairs",
    "quadratic",
    "ratios",
    "scenarios",
    "surrogate",
    "trajectories",
]
