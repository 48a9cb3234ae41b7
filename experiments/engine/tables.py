"""Tables of a record's runs, in the terminal."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.engine.measures import count
from si_jax import metrics

DIVERGED = "diverged"


def methods_of(runs: Mapping[str, Any]) -> dict[str, str]:
    """Whose run each is, by name."""
    return {name: run["method"] for name, run in runs.items()}


def over_seeds(runs: Mapping[Any, Any], error: str = "SEM") -> str:
    """What a table or figure shows of the methods' seeds."""
    n = counts(runs)
    return "one seed" if n == "1" else f"mean ± {error}, n = {n}"


def counts(runs: Mapping[Any, Any]) -> str:
    """How many seeds the methods have, from the fewest to the most."""
    numbers = sorted({count(run) for run in runs.values()})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def seeds_row(runs: dict[str, Any]) -> list[list[str]]:
    """A table's last row, how many seeds each method has, where they differ."""
    seeds = [str(count(run)) for run in runs.values()]
    return [["n", *seeds]] if len(set(seeds)) > 1 else []


def number(value: Any, form: str = ".4f") -> str:
    """A number as a table has it; where there is none, the run diverged."""
    return f"{value:{form}}" if np.isfinite(value) else DIVERGED


def cell(values: Any, form: str = ".4f") -> str:
    """Mean ± SEM over the seeds, or how many of them diverged."""
    values = np.asarray(values, np.float64)
    gone = int((~np.isfinite(values)).sum())
    if gone:
        return DIVERGED if gone == len(values) else f"{gone}/{len(values)} {DIVERGED}"
    mean = f"{values.mean():{form}}"
    return (
        mean if len(values) == 1 else f"{mean} ± {metrics.standard_error(values):.4f}"
    )


def table(runs: dict[str, Any], split: str, titles: list[str]) -> str:
    """A terminal table of the accuracies after the last task: mean ± SEM over seeds.

    A row a task, one for their average and one for :func:`metrics.forgetting`; a column
    a method.
    """
    columns = [["", *titles, "average", "forgetting"]]
    for method, run in runs.items():
        matrix = np.asarray(run[split])
        columns.append(
            [
                method,
                *(cell(matrix[:, -1, task]) for task in range(matrix.shape[-1])),
                cell(metrics.average_accuracy(matrix)),
                cell(metrics.forgetting(matrix)),
            ]
        )
    return aligned([*zip(*columns, strict=True), *seeds_row(runs)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as a table for the terminal, the first column to the left."""

    def width(word: str) -> int:
        return sum(not unicodedata.combining(character) for character in word)

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        gaps = [" " * (w - width(word)) for word, w in zip(row, widths, strict=True)]
        first, *rest = zip(row, gaps, strict=True)
        return "  ".join(["".join(first), *(gap + word for word, gap in rest)]).rstrip()

    return "\n".join(map(line, rows))
