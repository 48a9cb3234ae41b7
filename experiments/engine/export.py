"""Results for other programs: a tidy table as CSV, and TensorBoard."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.command import UserError
from si_jax import metrics

FIELDS = ("method", "strength", "damping", "scenario", "batch_size", "role")
COLUMNS = ("name", *FIELDS, "seed", "split", "measure", "after", "task", "value")


def measured(run: dict[str, Any], split: str) -> dict[str, np.ndarray]:
    """The usual measures of each of a method's runs on ``"test"`` or ``"train"``.

    Those of learning one task after the other are left out where there is one stage.
    """
    matrix = np.asarray(run[split])
    measures = {"average_accuracy": metrics.average_accuracy(matrix)}
    if matrix.shape[1] > 1:
        measures |= {
            "learning_accuracy": metrics.learning_accuracy(matrix),
            "forgetting": metrics.forgetting(matrix),
            "backward_transfer": metrics.backward_transfer(matrix),
        }
        if split == "test" and "initial" in run:
            initial = np.asarray(run["initial"])
            measures["forward_transfer"] = metrics.forward_transfer(matrix, initial)
    return {name: np.asarray(values) for name, values in measures.items()}


def tidy(runs: dict[str, Any]) -> str:
    """One observation a row, as CSV with the columns :data:`COLUMNS`.

    ``accuracy`` on every task after every stage, both counted from 1, and before the
    first, ``after`` 0; and :func:`measured`, of all tasks, with neither. What a run is
    stands in the columns :data:`FIELDS`, empty where it has no such thing; in a grid
    ``strength`` and ``damping`` are each point's. What was evaluated on a part to
    choose on is a ``loss``, and has no such measures.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, run in runs.items():
        observable = "loss" if "choice" in run else "accuracy"
        for row, point in enumerate(_points(run)):
            fields = {**run, **point}
            of = [name, *(fields.get(k, "") for k in FIELDS), point["seed"]]
            for split in splits(run):
                stages = [(i, x) for i, x in enumerate(run[split][row], start=1)]
                if split == "test" and "initial" in run:
                    stages = [(0, run["initial"][row]), *stages]
                for after, accuracies in stages:
                    for task, value in enumerate(accuracies, start=1):
                        observed = (split, observable, after, task, digits(value))
                        writer.writerow((*of, *observed))
                usual = {} if observable == "loss" else measured(run, split)
                for measure, values in usual.items():
                    whole = (split, measure, "", "", digits(values[row]))
                    writer.writerow((*of, *whole))
    return text.getvalue()


def digits(value: float) -> str:
    """Six of them; ``NaN`` of a run that diverged, as most readers of CSV spell it."""
    return f"{value:.6g}".replace("nan", "NaN")


def splits(run: dict[str, Any]) -> list[str]:
    """What a method was evaluated on."""
    return [split for split in ("test", "train", "choice") if split in run]


def _points(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Seed of each run, and in a grid its hyperparameters."""
    points = run.get("points") or {"seed": range(len(run["test"]))}
    rows = zip(*points.values(), strict=True)
    return [dict(zip(points, row, strict=True)) for row in rows]


class TensorBoard:
    """A folder that TensorBoard shows, a run in it for each of a method's.

    Raises:
      UserError: if its writer is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs tensorboardX, which is not installed: "
                'pip install -e ".[tensorboard]"'
            ) from error
        self._writer = SummaryWriter
        self._folder = folder
        self._open: dict[Path, Any] = {}

    def log(
        self, method: str, seeds: str, position: int, values: dict[str, Any]
    ) -> None:
        """The values of an epoch, ``(runs,)`` each, against the epochs so far.

        What was written from ``position`` on, by a run that was interrupted, is gone.
        """
        for name, numbers in values.items():
            for i, value in enumerate(np.asarray(numbers)):
                writer = self._of(method, seeds, i, purge_step=position)
                writer.add_scalar(name, float(value), position)

    def add(self, method: str, seeds: str, run: dict[str, Any]) -> None:
        """The accuracies ``(runs, stages, tasks)``, against the stages; and close."""
        for split in splits(run):
            for (i, stage, task), value in np.ndenumerate(np.asarray(run[split])):
                writer = self._of(method, seeds, i)
                tag = f"{split}/task_{task + 1}"
                writer.add_scalar(tag, float(value), stage + 1)
        for writer in self._open.values():
            writer.close()
        self._open = {}

    def _of(self, method: str, seeds: str, i: int, **options: Any) -> Any:
        group = re.sub(r"[^\w.=+]+", "-", f"{method} seeds {seeds}")
        folder = self._folder / group / f"run-{i}"
        if folder not in self._open:
            self._open[folder] = self._writer(str(folder), **options)
        return self._open[folder]
