"""Split MNIST, the paper's Fig. 3: ``python -m experiments.split_mnist``."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import optax
from matplotlib.figure import Figure

import si_jax
from experiments import data, figures
from experiments.data import tasks
from experiments.engine import command, driver
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Problem, Run
from experiments.engine.tables import methods_of, over_seeds, table
from experiments.networks.models import MLP
from experiments.training.boundaries import consolidate, reset
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Learner

IMAGE_SHAPE = (28, 28, 1)
GROUPS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
TITLES = [f"{a} or {b}" for a, b in GROUPS]
NAMES = {"tfds": "MNIST", "mnist5k": "mnist5k (5,000 digits of MNIST)"}


@dataclasses.dataclass(frozen=True)
class Setting(command.Options):
    """The network and its training, whatever the method."""

    data: Literal["tfds", "mnist5k"] = "tfds"
    """MNIST itself through TFDS, or 5,000 of its digits that need no download."""
    epochs: int = 10
    """Passes over each task."""
    batch_size: int = 64
    """Examples a step."""
    learning_rate: float = 1e-3
    """Adam's."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    zero_init_output: bool = True
    """Start the output layer at zero, as the authors do."""
    reset_optimizer: bool = True
    """Start each task with a fresh optimizer."""
    keep_count: bool = False
    """Keep Adam's step count at a task's start, as the authors' code does."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(positive=("learning_rate",), at_least_1=("epochs", "batch_size"))
        if self.keep_count and not self.reset_optimizer:
            raise ValueError("keep_count needs reset_optimizer")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"hidden widths must be at least 1, got {self.hidden}")


@dataclasses.dataclass(frozen=True)
class Config(Setting):
    """Split MNIST (Fig. 3): five pairs of digits, learned one after the other."""

    seeds: int = 10
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    strengths: tuple[float, ...] = (1.0, 0.0)
    """c of eq. 4, a method each; 0 is fine-tuning, without consolidation."""
    damping: float = 1e-3
    """ξ of eq. 5."""
    sgd_learning_rate: float = 0.1
    """Of plain SGD without consolidation, a further method; 0 leaves it out."""
    state_dtype: Literal["bfloat16", "compact"] | None = None
    """Of SI's Ω and θ̃, compact of ω, too; None is float32."""

    PICKS: ClassVar[tuple[str, ...]] = ("seeds",)

    def __post_init__(self):
        """Refuse values that make no sense."""
        super().__post_init__()
        self.check(
            positive=("damping",), at_least_1=("seeds",), strengths=("strengths",)
        )
        if not 0 <= self.sgd_learning_rate < math.inf:
            raise ValueError(
                f"sgd_learning_rate must be >= 0, got {self.sgd_learning_rate}"
            )


def runs(config: Config) -> list[Run]:
    """What the configuration compares."""
    problem = functools.cache(lambda: make_problem(config))

    def arm(label: Label, learner: Callable[..., Learner], c: float = 0.0) -> Run:
        hyperparameters = {"strength": c, "damping": config.damping}
        seeds = range(config.seeds)
        return Run(label, learner, problem, seeds, config.epochs, hyperparameters)

    kept = config.state_dtype
    adam = make_learner(config, optax.adam(config.learning_rate), kept)
    arms = [
        arm(Label("si", c) if c else Label("fine-tuning"), adam, c)
        for c in config.strengths
    ]
    if config.sgd_learning_rate:
        plain = dataclasses.replace(config, keep_count=False)  # SGD has no count
        sgd = make_learner(plain, optax.sgd(config.sgd_learning_rate))
        arms.append(arm(Label("sgd"), sgd))
    return arms


def make_learner(
    config: Setting,
    inner: optax.GradientTransformation,
    state_dtype: str | None = None,
) -> Callable[..., Learner]:
    """The pieces of a run as a function of the hyperparameters that may be swept."""
    model = MLP(config.hidden, 10, config.zero_init_output)

    def make(strength: jax.Array, damping: jax.Array) -> Learner:
        tx = si_jax.with_synaptic_intelligence(
            inner, strength, damping, state_dtype=state_dtype
        )
        boundary: list[Boundary] = [consolidate]
        if config.reset_optimizer:
            boundary.append(reset(tx, keep_count=config.keep_count))
        return learner(
            model,
            tx,
            IMAGE_SHAPE,
            batch_size=config.batch_size,
            boundary=boundary,
        )

    return make


def make_problem(config: Setting, held_out: float = 0.0) -> Problem:
    """The five tasks, tested on a part of the training set if it is held out."""
    digits = data.load("mnist", config.data, config.data_dir)
    digits = data.hold_out(digits, held_out)
    return Problem(
        digits.train,
        digits.test,
        tasks.split_classes(digits.train.labels, GROUPS, digits.classes),
        tasks.split_classes(digits.test.labels, GROUPS, digits.classes),
    )


def run(config: Config) -> None:
    """Run every method that is not finished, then print and draw all of them."""
    folder = config.data + "-keep-count" * config.keep_count
    folder += f"-{config.state_dtype}" if config.state_dtype else ""
    record = Record("split_mnist", config, default=folder)
    driver.run_all(runs(config), record)
    if is_first():
        report(config, record)


def report(config: Config, record: Record) -> None:
    """Print and draw the finished methods."""
    name = NAMES[config.data]
    for split in ("train", "test"):
        print(
            f"\nSplit {name}: {split} accuracy after all tasks, "
            + over_seeds(record.runs)
        )
        print(table(record.runs, split, TITLES))
    seconds = ", ".join(f"{k} {v['seconds']:.0f} s" for k, v in record.runs.items())
    print(f"\nTook {seconds}. Everything is in {record.folder}.")
    reset = ", the authors' reset of Adam" * config.keep_count
    record.save("split_mnist", figure(record.runs, name + reset))


def figure(runs: dict[str, Any], name: str) -> Figure:
    """Fig. 3 of the finished methods, on the test set."""
    return figures.accuracy_by_task(
        {method: run["test"] for method, run in runs.items()},
        TITLES,
        chance=0.5,
        methods=methods_of(runs),
        suptitle=f"Split {name}, test accuracy, {over_seeds(runs)}",
    )


if __name__ == "__main__":
    command.main(Config, "split_mnist", run)
