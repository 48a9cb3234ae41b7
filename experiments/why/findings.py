"""What was found: tables and figures."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import split_mnist
from experiments.engine import choice
from experiments.engine.record import Record
from experiments.engine.run import Label
from experiments.engine.tables import aligned, cell, over_seeds
from experiments.why import figures
from experiments.why.config import CORRELATED, MEASURES, TITLES, Config
from si_jax import metrics


def report(config: Config, record: Record) -> None:
    """Print and draw what is finished."""
    runs = record.runs
    name = f"{config.network.capitalize()} {split_mnist.NAMES[config.data]}"
    print(f"\n{name}: ω after the first task, mean ± SEM, n = {config.networks}")
    print(bias_table(runs))
    for with_ in ("si", "root fisher", "hessian"):
        print(f"\nRank, linear correlation with {TITLES[with_]}")
        print(correlation_table(runs, with_))
    record.save("why_correlations", correlations_figure(runs, name))
    learned = dict(tested(runs))
    if learned:
        print("\nHeld-out accuracy after all tasks, mean over the seeds; * is chosen")
        print(choice_table(config, runs))
        over = over_seeds(learned)
        print(f"\n{name}: test accuracy after all tasks, {over}")
        print(accuracy_table(runs))
        record.save("why", accuracy_figure(runs, f"{name}, {over}"))
    seconds = sum(run.get("seconds", 0) for run in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")


def grid(batch_size: int, name: str) -> Label:
    """Of the runs that an importance's strength is chosen from."""
    return Label(name, batch_size=batch_size, role="grid")


def measured(runs: dict[str, Any]) -> dict[int, Any]:
    """What was measured, by batch size, from the smallest."""
    by_size = {x["batch_size"]: x for x in runs.values() if x["method"] == MEASURES}
    return dict(sorted(by_size.items()))


def tested(runs: dict[str, Any]) -> Iterator[tuple[tuple[int, str], Any]]:
    """What was learned and tested, by batch size and importance."""
    for run in runs.values():
        if "points" not in run:
            yield (run["batch_size"], run["method"]), run


def shares(omega: dict[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """The parts of Σω that are bias, by noise and by long steps, ``(networks,)`` each.

    Along a step the gradient changes: that at its start, SI's, overestimates the loss
    drop, and that at its end, the unbiased one's, underestimates it, where the loss is
    quadratic by as much. Their mean would be the loss drop, but for noise.

    What is noise is at least this, and what is long steps at most. An epoch draws
    without replacement, so that the next minibatch's noise opposes a little that of the
    step, which makes the unbiased sum too low.
    """
    total, unbiased, drop = (
        np.asarray(omega[k]) for k in ("sum", "unbiased", "loss drop")
    )
    return {
        "noise": (total + unbiased - 2 * drop) / total,
        "long steps": 2 * (drop - unbiased) / total,
    }


def correlated(measures: dict[str, Any]) -> Sequence[str]:
    """The importances; of an older record, those that there were."""
    (layer, *_) = measures["layers"].values()
    return CORRELATED[: np.shape(layer["rank"])[-1]]


def bias_table(runs: dict[str, Any]) -> str:
    """A row a batch size: Σω, without its bias, the loss drop, the bias' shares."""
    rows = [["batch size", "Σω", "unbiased", "loss drop"]]
    rows[0] += ["noise / Σω ≥", "long steps / Σω ≤"]
    for batch_size, measures in measured(runs).items():
        omega = measures["ω"]
        sums = [cell(omega[k]) for k in ("sum", "unbiased", "loss drop")]
        rows.append([str(batch_size), *sums, *map(cell, shares(omega).values())])
    return aligned(rows)


def correlation_table(runs: dict[str, Any], with_: str) -> str:
    """A row a batch size and importance, a column a layer: rank, linear ± SEM."""
    column, rows = CORRELATED.index(with_), []
    for batch_size, measures in measured(runs).items():
        rows.append([f"batch size {batch_size}", *measures["layers"]])
        for i, name in enumerate(correlated(measures)):
            if i == column:
                continue
            row = [f"  {TITLES[name]}"]
            for layer in measures["layers"].values():
                both = (np.asarray(layer[k])[:, i, column] for k in ("rank", "linear"))
                row.append(", ".join(map(short, both)))
            rows.append(row)
    return aligned(rows)


def short(values: np.ndarray) -> str:
    """Mean ± SEM to two digits."""
    if len(values) == 1:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {metrics.standard_error(values):.2f}"


def choice_table(config: Config, runs: dict[str, Any]) -> str:
    """A row an importance and batch size: accuracy by pull, the best with a *."""
    rows = [["", "batch size", *(f"{pull:g}" for pull in config.pulls)]]
    for name in TITLES:
        for batch_size in measured(runs):
            if run := runs.get(str(grid(batch_size, name))):
                after = np.asarray(metrics.average_accuracy(run["test"]))
                cells = choice.choices(after.reshape(-1, len(config.pulls)))
                rows.append([TITLES[name], str(batch_size), *cells])
    return aligned(rows)


def accuracy_table(runs: dict[str, Any]) -> str:
    """A row an importance, a column a batch size: accuracy averaged over the tasks."""
    tests, sizes = dict(tested(runs)), list(measured(runs))
    rows = [["importance", *(f"batch size {size}" for size in sizes)]]
    for name, title in TITLES.items():
        cells = [
            cell(metrics.average_accuracy(tests[size, name]["test"]))
            if (size, name) in tests
            else ""
            for size in sizes
        ]
        rows += [[title, *cells]] if any(cells) else []
    return aligned(rows)


def correlations_figure(runs: dict[str, Any], name: str) -> Figure:
    """All pairs, a panel a batch size and layer."""
    names = min(map(correlated, measured(runs).values()), key=len)
    return figures.pairs(
        {
            f"batch size {batch_size}": {
                layer: {
                    k: np.mean(x[k], axis=0)[: len(names), : len(names)]
                    for k in ("rank", "linear")
                }
                for layer, x in measures["layers"].items()
            }
            for batch_size, measures in measured(runs).items()
        },
        [TITLES[x] for x in names],
        suptitle=f"{name}, after the first task",
    )


def accuracy_figure(runs: dict[str, Any], name: str) -> Figure:
    """The bias and the accuracies by batch size."""
    accuracy: dict[str, dict[int, Any]] = {}
    for (size, of), run in tested(runs):
        after = np.asarray(metrics.average_accuracy(run["test"]))
        accuracy.setdefault(TITLES[of], {})[size] = after
    of_size = {size: shares(measures["ω"]) for size, measures in measured(runs).items()}
    return figures.by_batch_size(
        {
            f"{name}, {bound}": {size: parts[name] for size, parts in of_size.items()}
            for name, bound in (("noise", "at least"), ("long steps", "at most"))
        },
        accuracy,
        suptitle=name,
    )
