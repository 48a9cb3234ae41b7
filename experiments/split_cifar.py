"""Split CIFAR, the paper's Fig. 6: ``python -m experiments.split_cifar``."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import si_jax
from experiments import data, figures
from experiments.data import tasks
from experiments.engine import command, driver
from experiments.engine.measures import statistics, summarize
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Problem, Run
from experiments.engine.tables import (
    aligned,
    cell,
    methods_of,
    over_seeds,
    seeds_row,
)
from experiments.networks.models import CNN
from experiments.training.boundaries import consolidate, reset
from experiments.training.classifier import learner
from experiments.training.loop import Learner

Name = Literal["si", "fine-tuning", "from scratch"]
# The authors' data (https://github.com/ganguli-lab/pathint), five seeds.
PUBLISHED = {
    "si c=0.01": [0.746, 0.718, 0.714, 0.744, 0.704, 0.786],
    "si c=0.1": [0.783, 0.743, 0.682, 0.719, 0.670, 0.725],
    "fine-tuning": [0.459, 0.549, 0.570, 0.687, 0.675, 0.810],
    "from scratch": [0.804, 0.690, 0.647, 0.733, 0.679, 0.713],
}
TRAIN_EVALUATED = 2000  # of each task's training examples, to evaluate on


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Split CIFAR-10/100 (Fig. 6): CIFAR-10, then 50 classes of CIFAR-100 by tens."""

    methods: tuple[Name, ...] = ("si", "fine-tuning", "from scratch")
    """What to run; more can be added later in the same --out."""
    seeds: int = 1
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    data: Literal["cifar10-100", "cifar10"] = "cifar10-100"
    """Six tasks of ten classes, or the supplement's: CIFAR-10 as two tasks of five."""
    examples: int = 0
    """Of each task, to train on and as many at most to test on; 0: all."""
    epochs: int = 60
    """Passes over each task."""
    batch_size: int = 256
    """Examples a step."""
    micro_batch: int = 32
    """Parts of a batch to take one by one: faster on a CPU; 0 for a GPU."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters and SI's state are float32."""
    learning_rate: float = 1e-3
    """Adam's."""
    keep_count: bool = False
    """Keep Adam's step count at a task's start, as the authors' code does."""
    strengths: tuple[float, ...] = (0.01, 0.1)
    """c of eq. 4, a method each."""
    damping: float = 1e-3
    """ξ of eq. 5."""
    held_out: float = 0.0
    """Fraction of the training set to choose c on, in the test set's place; 0: none."""

    PICKS: ClassVar[tuple[str, ...]] = ("methods", "seeds", "strengths")

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(
            positive=("learning_rate", "damping"),
            at_least_0=("micro_batch", "examples"),
            at_least_1=("seeds", "epochs", "batch_size"),
            shares=("held_out",),
            strengths=("strengths",),
            named=("methods",),
        )


def groups(config: Config) -> list[range]:
    """The classes of each task."""
    if config.data == "cifar10":
        return [range(5), range(5, 10)]
    return [range(start, start + 10) for start in range(0, 60, 10)]


def titles(config: Config) -> list[str]:
    """A name for each task."""
    if config.data == "cifar10":
        return ["classes 0–4", "classes 5–9"]
    return ["CIFAR-10", *(f"CIFAR-100\n{k}–{k + 9}" for k in range(0, 50, 10))]


def make_problem(config: Config) -> Problem:
    """The tasks, one after the other."""
    images = data.load("cifar10", data_dir=config.data_dir)
    if config.data == "cifar10-100":
        hundred = data.load("cifar100", data_dir=config.data_dir)
        images = data.join(images, data.select(hundred, 50))
    images = data.hold_out(images, config.held_out)
    train, test = (
        tasks.split_classes(examples.labels, groups(config), images.classes)
        for examples in (images.train, images.test)
    )
    if config.examples:
        train, test = (tasks.first(x, config.examples) for x in (train, test))
    return Problem(
        images.train, images.test, tasks.first(train, TRAIN_EVALUATED), test, train
    )


def make_learner(config: Config) -> Callable[..., Learner]:
    """The pieces of a run as a function of the hyperparameters that may be swept."""
    model = CNN(sum(map(len, groups(config))), dtype=config.compute)
    adam = optax.adam(config.learning_rate)

    def make(strength: jax.Array, damping: jax.Array) -> Learner:
        tx = si_jax.with_synaptic_intelligence(adam, strength, damping)
        return learner(
            model,
            tx,
            (32, 32, 3),
            batch_size=config.batch_size,
            boundary=[consolidate, reset(tx, keep_count=config.keep_count)],
            dropout=True,
            micro_batch=config.micro_batch,
        )

    return make


def runs(config: Config) -> list[Run]:
    """What the configuration compares."""
    make = make_learner(config)
    problem = functools.cache(lambda: make_problem(config))

    def arm(method: Name, c: float | None = None) -> Run:
        return Run(
            Label(method, c),
            make,
            problem,
            range(config.seeds),
            config.epochs,
            {"strength": c or 0.0, "damping": config.damping},
            from_scratch=method == "from scratch",
            first_task="first task",  # two thirds of a run: CIFAR-10
        )

    strengths = {"si": config.strengths}
    return [
        arm(method, c)
        for method in config.methods
        for c in strengths.get(method, (None,))
    ]


def run(config: Config) -> None:
    """Run every method that is not finished, then print and draw all of them."""
    small = f"-{config.examples}" * bool(config.examples)
    folder = config.data + small + "-held-out" * bool(config.held_out)
    folder += "-keep-count" * config.keep_count
    folder += "-bfloat16" * (config.compute == "bfloat16")
    record = Record("split_cifar", config, default=folder)
    driver.run_all(runs(config), record, summary)
    if is_first():
        report(config, record)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """The usual measures; of nets from scratch, the mean accuracy on their own task."""
    if run["method"] != "from scratch":
        return summarize(run)
    return {
        split: {"average_accuracy": statistics(final(run, split).mean(1))}
        for split in ("test", "train")
    }


def final(run: dict[str, Any], split: str) -> np.ndarray:
    """``(seeds, tasks)``: after all tasks, or each right after training on it alone."""
    matrix = np.asarray(run[split])
    if run["method"] == "from scratch":
        return np.diagonal(matrix, axis1=1, axis2=2)
    return matrix[:, -1]


def report(config: Config, record: Record) -> None:
    """Print and draw the finished methods."""
    for split, name in (("train", "training"), ("test", "validation")):
        print(
            f"\n{name.capitalize()} accuracy after all tasks, "
            + over_seeds(record.runs)
        )
        theirs = published(config) if split == "test" else {}
        print(table(record.runs, split, titles(config), theirs))
    seconds = ", ".join(f"{k} {v['seconds']:.0f} s" for k, v in record.runs.items())
    print(f"\nTook {seconds}. Everything is in {record.folder}.")
    record.save("split_cifar", figure(record.runs, config))


def published(config: Config) -> dict[str, list[float]]:
    """The authors' data, beside a run of their length."""
    whole = not (config.examples or config.held_out) and config.epochs == 60
    return PUBLISHED if whole and config.data == "cifar10-100" else {}


def table(
    runs: dict[str, Any],
    split: str,
    titles: list[str],
    published: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """A row a task and their mean, a column a method.

    Below, likewise: what each gains on networks from scratch, by the seeds that both
    have, and the authors' data, ``(tasks,)`` of a method.
    """
    rows = [*(title.replace("\n", " ") for title in titles), "mean"]

    def block(name: str, cells: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
        columns = [[method, *column] for method, column in cells.items()]
        return [*zip([name, *rows], *columns, strict=True)]

    values = {method: final(run, split) for method, run in runs.items()}
    cells = {k: [*map(cell, x.T), cell(x.mean(1))] for k, x in values.items()}
    blocks = [aligned([*block("", cells), *seeds_row(runs)])]
    scratch = values.pop("from scratch", None)
    if scratch is not None and values:
        gains = {k: x[: len(scratch)] - scratch[: len(x)] for k, x in values.items()}
        cells = {
            k: [cell(gain, "+.4f") for gain in (*x.T, x.mean(1))]
            for k, x in gains.items()
        }
        blocks.append(aligned(block("− from scratch", cells)))
    theirs = {k: x for k, x in (published or {}).items() if k in runs}
    if theirs:
        cells = {k: [f"{a:.3f}" for a in (*x, np.mean(x))] for k, x in theirs.items()}
        blocks.append(aligned(block("the authors'", cells)))
    return "\n\n".join(blocks)


def figure(runs: dict[str, Any], config: Config) -> Figure:
    """Fig. 6 of the finished methods."""
    bars = {
        label: {method: final(run, split) for method, run in runs.items()}
        for label, split in (
            ("Validation accuracy", "test"),
            ("Training accuracy", "train"),
        )
    }
    shown = "CIFAR-10" if config.data == "cifar10" else "CIFAR-10/100"
    reset = "the authors' reset of Adam" if config.keep_count else "fresh Adam"
    return figures.final_accuracy(
        bars,
        titles(config),
        chance=1 / len(groups(config)[0]),
        published=published(config),
        methods=methods_of(runs),
        suptitle=f"Split {shown} after all tasks, {reset}, " + over_seeds(runs, "SD"),
    )


if __name__ == "__main__":
    command.main(Config, "split_cifar", run)
