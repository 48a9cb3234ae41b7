"""Choose c and ξ for split MNIST on held-out data: ``python -m experiments.sweep``."""

import dataclasses
import json

import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import figures, split_mnist
from experiments.engine import command, driver
from experiments.engine.choice import choose
from experiments.engine.measures import summarize
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Run
from experiments.engine.tables import number, table
from si_jax import metrics

GRID = Label("grid")


@dataclasses.dataclass(frozen=True)
class Config(split_mnist.Setting):
    """The strength c and the damping ξ for split MNIST, chosen on held-out data.

    Every point of the grid is trained on a part of the training set and evaluated on
    the rest of it. The best point is then trained on the whole training set with fresh
    seeds and evaluated on the test set, which has no part in the choice.
    """

    seeds: int = 5
    """Runs of each point, with the seeds 0, 1, …; then as many fresh ones."""
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """The values of c (eq. 4)."""
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """The values of ξ (eq. 5)."""
    held_out: float = 1 / 6
    """The fraction of the training set to choose on."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        super().__post_init__()
        self.check(at_least_1=("seeds",), strengths=("strengths",))
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not min(self.dampings, default=0) > 0:
            raise ValueError(f"dampings must be > 0, got {self.dampings}")


def run(config: Config) -> None:
    """Run the grid, choose, and run the choice; what is finished is not repeated."""
    record = Record("sweep", config, default=config.data)
    grid = Run(
        GRID,
        split_mnist.make_learner(config, optax.adam(config.learning_rate)),
        lambda: split_mnist.make_problem(config, config.held_out),
        range(config.seeds),
        config.epochs,
        {},
    )
    axes = {"strength": config.strengths, "damping": config.dampings}
    held_out = driver.run_grid(grid, axes, record)
    accuracy = np.asarray(metrics.average_accuracy(held_out))
    i, j = choose(accuracy)
    strength, damping = config.strengths[i], config.dampings[j]
    choice = dataclasses.replace(
        grid,
        label=Label("si", strength, damping),
        problem=lambda: split_mnist.make_problem(config),
        seeds=range(config.seeds, 2 * config.seeds),
    )
    axes = {"strength": (strength,), "damping": (damping,)}
    driver.run_grid(choice, axes, record, summarize)
    if is_first():
        report(config, record, accuracy, (i, j), choice.name)


def report(
    config: Config,
    record: Record,
    accuracy: np.ndarray,
    chosen: tuple[int, int],
    choice: str,
) -> None:
    """Print and draw the grid and the choice, and write it as a configuration."""
    strength, damping = config.strengths[chosen[0]], config.dampings[chosen[1]]
    name = split_mnist.NAMES[config.data]
    print(f"\nSplit {name}: held-out accuracy after all tasks, mean of {config.seeds}")
    print(grid_table(accuracy.mean(axis=0), config))
    print(
        f"\nThe best: c = {strength:g}, ξ = {damping:g}. On the test set, fresh seeds:"
    )
    print(table({choice: record.runs[choice]}, "test", split_mnist.TITLES))
    record.save("sweep", figure(accuracy, chosen, config))
    record.write("chosen.toml", chosen_config(config, strength, damping))
    path = record.folder / "chosen.toml"
    print(f"\nRun it with: python -m experiments.split_mnist --config {path}")


def chosen_config(config: Config, strength: float, damping: float) -> str:
    """A configuration of ``experiments.split_mnist`` with the choice."""
    names = [field.name for field in dataclasses.fields(split_mnist.Setting)]
    places = [field.name for field in dataclasses.fields(command.Options)]
    values = {name: getattr(config, name) for name in names if name not in places}
    values.update(seeds=config.seeds, strengths=[strength, 0.0], damping=damping)
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(
        ["# Chosen on held-out data by python -m experiments.sweep.", *lines, ""]
    )


def figure(accuracy: np.ndarray, chosen: tuple[int, int], config: Config) -> Figure:
    """The grid as a heat map, the choice framed."""
    return figures.heat_map(
        accuracy.mean(axis=0),
        config.strengths,
        config.dampings,
        labels=("strength c", "damping ξ"),
        title=f"Held-out accuracy, mean of {config.seeds} seeds",
        chosen=chosen,
    )


def grid_table(mean: np.ndarray, config: Config) -> str:
    """The grid's mean accuracies: a row a strength, a column a damping."""
    head = "c \\ ξ".ljust(8) + "".join(f"{x:>10g}" for x in config.dampings)
    rows = [
        f"{c:<8g}" + "".join(f"{number(x):>10}" for x in row)
        for c, row in zip(config.strengths, mean, strict=True)
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    command.main(Config, "sweep", run)
