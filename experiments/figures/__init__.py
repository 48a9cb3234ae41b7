"""The figures of the paper, and of what is measured besides."""

from experiments.figures.accuracy import (
    accuracy_by_task,
    average_accuracy,
    correlations,
    final_accuracy,
    heat_map,
)
from experiments.figures.style import COLOURS, METHODS
from experiments.figures.theory import quadratic, surrogate, trajectories

__all__ = [
    "COLOURS",
    "METHODS",
    "accuracy_by_task",
    "average_accuracy",
    "correlations",
    "final_accuracy",
    "heat_map",
    "quadratic",
    "surrogate",
    "trajectories",
]
