"""What is said of a run: how many seeds, which diverged, means and errors."""

from typing import Any

import numpy as np

from experiments.engine.export import measured, splits
from experiments.engine.text import digits


def count(run: dict[str, Any]) -> int:
    """How many seeds a method has run."""
    return len(run["test"])


def diverged(run: dict[str, Any]) -> list[int]:
    """Which of a method's runs ended without numbers, from 0."""
    gone = [np.isnan(np.asarray(run[split], np.float64)) for split in splits(run)]
    return sorted({int(i) for x in gone for i in np.argwhere(x)[:, 0]})


def part_of(
    run: dict[str, Any], versions: dict[str, Any], earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Which versions made how many of a method's seeds, and in what time."""
    part = {"seeds": count(run), "seconds": run["seconds"], "versions": versions}
    return part | ({"earlier_versions": earlier} if earlier else {})


def joined(before: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A method's run with further seeds behind those it has."""
    whole: dict[str, Any] = {}
    for key, value in more.items():
        if key == "seconds":
            whole[key] = round(before[key] + value, 1)
        elif isinstance(value, dict):
            whole[key] = joined(before[key], value)
        else:
            whole[key] = before[key] + value
    return whole


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Mean, standard error and deviation over the seeds of the usual measures."""
    return {
        split: {name: statistics(x) for name, x in measured(run, split).items()}
        for split in ("test", "train")
    }


def statistics(values: Any) -> dict[str, float | None]:
    """Mean, standard error and deviation of a number a seed; one has no spread.

    Where some diverged there is none of the three, but how many did.
    """
    values = np.asarray(values, np.float64)
    n, gone = len(values), int((~np.isfinite(values)).sum())
    deviation = float(values.std(ddof=1)) if n > 1 else None
    return {
        "mean": digits(values.mean()),
        "sem": None if deviation is None else digits(deviation / n**0.5),
        "std": None if deviation is None else digits(deviation),
        "n": n,
        **({"diverged": gone} if gone else {}),
    }
