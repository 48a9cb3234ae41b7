"""What an experiment leaves behind: its configuration, versions and accuracies."""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.command import UserError
from si_jax import metrics
from si_jax.figures import standard_error

PACKAGES = ("si_jax", "jax", "jaxlib", "flax", "optax", "numpy")
# Where things lie does not change what comes out.
PLACES = ("out", "data_dir", "overwrite")


class Record:
    """The folder of one experiment: its configuration, results and metrics.

    Finished methods are kept: the same configuration goes on where it was left, another
    one is refused.
    """

    def __init__(self, experiment: str, config: Any):
        self.folder = Path(config.out)
        entries = _jsonable(dataclasses.asdict(config))
        for place in PLACES:
            entries.pop(place)
        if config.overwrite:
            for file in ("config.json", "results.json", "metrics.jsonl"):
                (self.folder / file).unlink(missing_ok=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {self.folder}: {error}") from error
        self.content = self._read() or {
            "experiment": experiment,
            "config": entries,
            "versions": versions(),
            "runs": {},
            "summary": {},
        }
        self._refuse_another(experiment, entries)
        self._write("config.json", {k: self.content[k] for k in ("config", "versions")})

    @property
    def runs(self) -> dict[str, Any]:
        """The finished methods' accuracies."""
        return self.content["runs"]

    def add(self, method: str, run: dict[str, Any]) -> None:
        """Keep a finished method."""
        self.runs[method] = _jsonable(run)
        self.content["summary"][method] = summary(run)
        self._write("results.json", self.content)

    def log(self, **entry: Any) -> None:
        """Append a line to ``metrics.jsonl``."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_jsonable(entry)) + "\n")

    def save(self, name: str, figure: Figure) -> None:
        """Write a figure as PNG and PDF."""
        for suffix in ("png", "pdf"):
            figure.savefig(self.folder / f"{name}.{suffix}")

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "results.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}): choose another --out, or --overwrite."
            ) from error

    def _refuse_another(self, experiment: str, entries: dict[str, Any]) -> None:
        there, here = self.content["config"], entries
        if self.content["experiment"] != experiment:
            difference = f"another experiment, {self.content['experiment']}"
        else:
            difference = ", ".join(
                f"{key}: {there.get(key)} there, {here.get(key)} now"
                for key in {**there, **here}
                if there.get(key) != here.get(key)
            )
        if difference:
            raise UserError(
                f"{self.folder} holds the results of another configuration "
                f"({difference}). Choose another --out, or --overwrite."
            )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Whole or not at all."""
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            part.write_text(_readable(content))
            part.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def versions() -> dict[str, Any]:
    """What a number depends on besides its configuration."""
    git = shutil.which("git")
    commit = (
        git
        and subprocess.run(
            [git, "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    device = jax.devices()[0]
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit or None,
        "device": f"{device.platform}: {device.device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Mean, standard error and deviation over the seeds of the usual measures."""
    return {
        split: {
            name: _statistics(measure(np.asarray(run[split])))
            for name, measure in (
                ("average_accuracy", metrics.average_accuracy),
                ("learning_accuracy", metrics.learning_accuracy),
                ("forgetting", metrics.forgetting),
                ("backward_transfer", metrics.backward_transfer),
            )
        }
        for split in ("test", "train")
    }


def _statistics(values: Any) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    return {
        "mean": round(float(values.mean()), 6),
        "sem": round(float(standard_error(values)), 6),
        "std": round(float(values.std(ddof=1)) if len(values) > 1 else 0.0, 6),
        "n": len(values),
    }


def table(
    runs: dict[str, Any], split: str, titles: list[str], seeds_as: str = "±"
) -> str:
    """A terminal table of the accuracies after the last task, mean ± SEM over seeds."""

    def cell(values: Any) -> str:
        values = np.asarray(values, np.float64)
        return f"{values.mean():.4f} {seeds_as} {standard_error(values):.4f}"

    rows = [["", *titles, "average", "forgetting"]]
    for method, run in runs.items():
        matrix = np.asarray(run[split])
        rows.append(
            [
                method,
                *(cell(matrix[:, -1, task]) for task in range(matrix.shape[-1])),
                cell(metrics.average_accuracy(matrix)),
                cell(metrics.forgetting(matrix)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _readable(content: dict[str, Any]) -> str:
    """Indented JSON, with a line for each row of numbers instead of each number."""
    text = json.dumps(content, indent=1)
    rows = r"\[\s*([^\[\]{}]*?)\s*\]"
    return re.sub(rows, lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def _jsonable(value: Any) -> Any:
    """Paths as text, tuples as lists, arrays as lists of rounded numbers."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, jax.Array)):
        return np.round(np.asarray(value, np.float64), 6).tolist()
    if isinstance(value, Path):
        return str(value)
    return value
