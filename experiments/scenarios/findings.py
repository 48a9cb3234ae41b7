"""What was found: tables and the figure."""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure

from experiments import split_mnist
from experiments.engine.choice import choices
from experiments.engine.export import measured
from experiments.engine.record import Record
from experiments.engine.run import Label
from experiments.engine.tables import aligned, cell, counts, over_seeds
from experiments.scenarios import figures
from experiments.scenarios.config import SCENARIOS, Config, Name
from experiments.scenarios.methods import arms
from si_jax import metrics


def of_scenario(runs: dict[str, Any], scenario: str) -> dict[str, Any]:
    """The finished methods of a scenario, by name, without their grids."""
    return {
        name.removeprefix(f"{scenario}: "): run
        for name, run in runs.items()
        if run.get("scenario") == scenario and "role" not in run
    }


def report(config: Config, record: Record) -> None:
    """Print and draw the finished methods."""
    runs, name = record.runs, split_mnist.NAMES[config.data]
    scenarios: dict[str, dict[str, Any]] = {s: of_scenario(runs, s) for s in SCENARIOS}
    scenarios = {scenario: of for scenario, of in scenarios.items() if of}
    print("\nHeld-out accuracy after all tasks, mean over the seeds; * is chosen")
    print(choice_table(config, runs))
    every = {(s, name): run for s, of in scenarios.items() for name, run in of.items()}
    print(f"\nSplit {name}: test accuracy after all tasks, " + over_seeds(every))
    print(table(scenarios))
    for scenario, of in scenarios.items():
        print(f"\n{scenario.capitalize()}-incremental, test")
        print(measures_table(of))
    seconds = sum(run["seconds"] for run in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")
    record.save("scenarios", figure(scenarios, name, over_seeds(every)))


def choice_table(config: Config, runs: dict[str, Any]) -> str:
    """A row a method and strength, a column a scenario: accuracy, the best with a *."""
    rows = [["", *SCENARIOS]]
    for method, arm in arms(config).items():
        names = [str(Label(method, c)) for c in arm.candidates]
        columns = []
        for scenario in SCENARIOS:
            cells = [""] * len(names)
            if names and (
                grid := runs.get(str(Label(method, scenario=scenario, role="grid")))
            ):
                after = np.asarray(metrics.average_accuracy(grid["test"]))
                cells = choices(after.reshape(-1, len(names)))
            columns.append(cells)
        rows += map(list, zip(names, *columns, strict=True))
    return aligned(shown(rows))


def shown(rows: list[list[str]]) -> list[list[str]]:
    """A table without its empty rows and columns."""
    columns = [x for x in zip(*rows, strict=True) if any(x[1:])]
    return [list(row) for row in zip(*columns, strict=True) if any(row[1:])]


def table(scenarios: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a method, a column a scenario: accuracy averaged over the tasks.

    The last row is how many seeds they have, where they differ.
    """
    rows = [["", *scenarios]]
    for method in get_args(Name):
        row: list[str] = [method]
        for of in scenarios.values():
            named = [run for run in of.values() if run["method"] == method]
            row += [cell(metrics.average_accuracy(x["test"])) for x in named] or [""]
        rows.append(row)
    seeds = [counts(of) for of in scenarios.values()]
    if len(set(seeds)) > 1 or "to" in seeds[0]:
        rows.append(["n", *seeds])
    return aligned([row for row in rows if any(row[1:])])


def measures_table(runs: Mapping[str, Any]) -> str:
    """A row a method, a column a measure; intransigence is beside joint training."""
    rows: list[dict[str, np.ndarray]] = []
    for run in runs.values():
        measures = measured(run, "test")
        if len(measures) > 1 and "joint" in runs:
            test = np.asarray(run["test"])
            reference = np.asarray(runs["joint"]["test"]).mean((0, 1))
            reference = np.broadcast_to(reference, (len(test), len(reference)))
            measures["intransigence"] = np.asarray(
                metrics.intransigence(test, reference)
            )
        rows.append(measures)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [method, *(cell(row[name]) if name in row else "" for name in names)]
        for method, row in zip(runs, rows, strict=True)
    ]
    return aligned([["", *(name.replace("_", " ") for name in names)], *cells])


def figure(scenarios: Mapping[str, Mapping[str, Any]], name: str, over: str) -> Figure:
    """A panel a scenario, on the test set."""
    return figures.scenarios(
        {
            f"{scenario.capitalize()}-incremental": {
                run["method"]: np.asarray(run["test"]) for run in of.values()
            }
            for scenario, of in scenarios.items()
        },
        suptitle=f"Split {name}, test accuracy, {over}",
    )
