"""Permuted MNIST, the paper's Figs. 4 and 5: ``python -m experiments.permuted_mnist``.

Ten tasks, the digits seen through ten permutations of their pixels, for one readout.
"""

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
from experiments.engine.measures import summarize
from experiments.engine.record import Record, is_first
from experiments.engine.run import Label, Problem, Run, at_once
from experiments.engine.tables import (
    aligned,
    cell,
    methods_of,
    over_seeds,
    seeds_row,
)
from experiments.networks.models import MLP
from experiments.split_mnist import IMAGE_SHAPE, NAMES
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_kronecker,
    consolidate_second_moment,
    kronecker_factors,
    merge,
)
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Learner, remembering
from si_jax import ewc, kronecker, metrics

Name = Literal[
    "si",
    "fine-tuning",
    "ewc",
    "ewc merged",
    "squisher",
    "kronecker",
    "sgd",
    "sgd+dropout",
    "joint",
    "single",
]
# The authors' data (https://github.com/ganguli-lab/pathint), one seed, after each task.
PUBLISHED = {
    "si c=0.1": [
        *(0.9830, 0.9832, 0.9827, 0.9799, 0.9789),
        *(0.9777, 0.9756, 0.9746, 0.9712, 0.9694),
    ],
    "fine-tuning": [
        *(0.9813, 0.9494, 0.8459, 0.8074, 0.7743),
        *(0.7286, 0.6670, 0.6680, 0.5850, 0.5741),
    ],
}
TRAIN_EVALUATED = 10_000  # of each task's training examples, to evaluate on


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Permuted MNIST (Figs. 4 and 5): one task after the other, several methods."""

    methods: tuple[Name, ...] = (
        "si",
        "fine-tuning",
        "ewc",
        "single",
        "joint",
        "sgd",
        "sgd+dropout",
    )
    """What to run; more can be added later in the same --out."""
    seeds: int = 1
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    data: Literal["tfds", "mnist5k"] = "tfds"
    """MNIST itself through TFDS, or 5,000 of its digits that need no download."""
    tasks: int = 10
    """Permutations of the pixels; the first leaves the digits as they are."""
    epochs: int = 20
    """Passes over each task."""
    batch_size: int = 256
    """Examples a step."""
    learning_rate: float = 1e-3
    """Adam's."""
    hidden: tuple[int, ...] = (2000, 2000)
    """Widths of the hidden layers."""
    damping: float = 0.1
    """ξ of eq. 5."""
    fisher_examples: int = 1000
    """Of each task, for the Fisher information of EWC, diagonal or in factors."""
    strengths: tuple[float, ...] = (0.1,)
    """c of eq. 4, a method each."""
    ewc_strengths: tuple[float, ...] = (1e6,)
    """c = λ/2 of EWC, merged or not, and of Squisher, with what Adam has kept."""
    kronecker_strengths: tuple[float, ...] = (3.0,)
    """c = λ/2 of EWC with Kronecker factors, a method each. The default is that of the
    narrow network, not chosen for the paper's."""
    sgd_learning_rate: float = 0.1
    """Of plain SGD."""
    dropout: float = 0.5
    """Of the hidden layers, for SGD with dropout."""
    state_dtype: Literal["bfloat16", "compact"] | None = None
    """Of SI's Ω and θ̃, compact of ω, too; in EWC bfloat16. None is float32, as
    Kronecker factors are in any case."""
    held_out: float = 0.0
    """Fraction of the training set to choose c on, in the test set's place; 0: none."""

    PICKS: ClassVar[tuple[str, ...]] = (
        "methods",
        "seeds",
        "strengths",
        "ewc_strengths",
        "kronecker_strengths",
    )

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(
            positive=("learning_rate", "damping", "sgd_learning_rate"),
            at_least_1=("seeds", "epochs", "batch_size", "tasks", "fisher_examples"),
            shares=("dropout", "held_out"),
            strengths=("strengths", "ewc_strengths", "kronecker_strengths"),
            named=("methods",),
        )
        if min(self.hidden, default=0) < 1:
            raise ValueError(
                f"hidden must be widths of at least 1, and one or more: {self.hidden}"
            )


def make_learner(
    config: Config,
    tx: Callable[[jax.Array, jax.Array], optax.GradientTransformation],
    *,
    boundary: Sequence[Boundary] = (),
    remember: bool = False,
    dropout: float = 0.0,
) -> Callable[..., Learner]:
    """The pieces of a run as a function of the hyperparameters that may be swept."""
    model = MLP(config.hidden, 10, dropout=dropout)

    def make(strength: jax.Array, damping: jax.Array) -> Learner:
        made = learner(
            model,
            tx(strength, damping),
            IMAGE_SHAPE,
            batch_size=config.batch_size,
            boundary=boundary,
            dropout=dropout > 0,
        )
        return remembering(made, config.tasks) if remember else made

    return make


def make_problem(config: Config) -> Problem:
    """The tasks, one after the other."""
    digits = data.load("mnist", config.data, config.data_dir)
    digits = data.hold_out(digits, config.held_out)
    train, test = (
        tasks.permuted(len(examples.labels), config.tasks, digits.classes)
        for examples in (digits.train, digits.test)
    )
    evaluated = tasks.first(train, TRAIN_EVALUATED)
    return Problem(
        digits.train, digits.test, evaluated, test, train, permutations=config.tasks
    )


def runs(config: Config) -> list[Run]:
    """What the configuration compares."""
    adam, sgd = optax.adam(config.learning_rate), optax.sgd(config.sgd_learning_rate)

    def synaptic(strength, damping):
        return si_jax.with_synaptic_intelligence(
            adam, strength, damping, state_dtype=config.state_dtype
        )

    def elastic(strength, _):
        narrow = "bfloat16" if config.state_dtype else None
        link = ewc.elastic_weight_consolidation(strength, state_dtype=narrow)
        return optax.chain(link, adam)

    def factored(strength, _):
        shapes = kronecker_factors(model, IMAGE_SHAPE)
        return optax.chain(kronecker.kronecker_consolidation(strength, shapes), adam)

    make = functools.partial(make_learner, config)
    of_si = make(synaptic, boundary=[consolidate], remember=True)  # ω for Fig. 5
    model, count = MLP(config.hidden, 10), config.fisher_examples
    problem = functools.cache(lambda: make_problem(config))

    def arm(
        learner: Callable[..., Learner],
        c: float | None = None,
        problem: Callable[[], Problem] = problem,
    ) -> Run:
        hyperparameters = {"strength": c or 0.0, "damping": config.damping}
        label, seeds = Label(method, c), range(config.seeds)
        return Run(label, learner, problem, seeds, config.epochs, hyperparameters)

    arms: list[Run] = []
    for method in config.methods:
        match method:
            case "si":
                arms += [arm(of_si, c) for c in config.strengths]
            case "fine-tuning":
                arms += [arm(of_si)]
            case "ewc":
                fisher = consolidate_fisher(model, count)
                of_ewc = make(elastic, boundary=[fisher])
                arms += [arm(of_ewc, c) for c in config.ewc_strengths]
            case "ewc merged":
                # Each task ends half way back to those before it.
                fisher = consolidate_fisher(model, count)
                of_merged = make(elastic, boundary=[merge(0.5), fisher])
                arms += [arm(of_merged, c) for c in config.ewc_strengths]
            case "squisher":
                free = consolidate_second_moment(config.batch_size)
                of_free = make(elastic, boundary=[free])
                arms += [arm(of_free, c) for c in config.ewc_strengths]
            case "kronecker":
                factors = consolidate_kronecker(model, count)
                of_factors = make(factored, boundary=[factors])
                arms += [arm(of_factors, c) for c in config.kronecker_strengths]
            case "sgd":
                arms += [arm(make(lambda *_: sgd))]
            case "sgd+dropout":
                arms += [arm(make(lambda *_: sgd, dropout=config.dropout))]
            case "joint":
                joint = functools.partial(at_once, problem)
                arms += [arm(make(lambda *_: adam), problem=joint)]
            case "single":
                first = functools.partial(only_the_first, problem)
                arms += [arm(make(lambda *_: adam), problem=first)]
    return arms


def only_the_first(make: Callable[[], Problem]) -> Problem:
    """A problem's first task alone."""
    problem = make()
    train, test, stages = (
        jax.tree.map(lambda x: x[:1], stack)
        for stack in (problem.train_tasks, problem.test_tasks, problem.stages)
    )
    return problem._replace(
        train_tasks=train, test_tasks=test, stages=stages, permutations=1
    )


def run(config: Config) -> None:
    """Run every method that is not finished, then print and draw all of them."""
    folder = f"{config.data}-held-out" if config.held_out else config.data
    record = Record("permuted_mnist", config, default=folder)
    driver.run_all(runs(config), record, summary)
    if is_first():
        report(config, record)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """The usual measures; of ω, how each task's correlates with those before."""
    measures = summarize(run)
    if "correlations" in run:
        for name, measure in CORRELATIONS.items():
            measures[f"correlation_with_{name.replace(' ', '_')}"] = {
                layer: measure(values) for layer, values in hidden_layers(run).items()
            }
    return measures


def hidden_layers(run: dict[str, Any]) -> dict[str, np.ndarray]:
    """``(seeds, tasks, tasks)``: correlations of ω in each hidden layer's kernel."""
    *hidden, _ = run["correlations"].values()
    return {f"layer {i}": np.asarray(x) for i, x in enumerate(hidden, start=1)}


def with_earlier(correlations: np.ndarray) -> np.ndarray:
    """``(tasks - 1,)``: each task's mean correlation of ω with the earlier tasks."""
    mean = correlations.mean(0)
    return np.array([row[:i].mean() for i, row in enumerate(mean) if i])


def with_last(correlations: np.ndarray) -> np.ndarray:
    """``(tasks - 1,)``: each task's correlation of ω with the task before."""
    return np.diagonal(correlations.mean(0), 1)


CORRELATIONS = {"earlier tasks": with_earlier, "last task": with_last}


def report(config: Config, record: Record) -> None:
    """Print and draw the finished methods."""
    runs, name = record.runs, NAMES[config.data]
    print(
        f"\nPermuted {name}: test accuracy, average over the tasks so far, "
        + over_seeds(runs)
    )
    print(table(runs, published(config)))
    correlated = {k: hidden_layers(v) for k, v in runs.items() if "correlations" in v}
    if correlated and config.tasks > 1:
        for which, measure in CORRELATIONS.items():
            print(f"\nCorrelation of each task's ω with that of the {which}")
            print(correlation_table(correlated, measure))
        record.save("permuted_mnist_correlations", correlation_figure(correlated))
    seconds = ", ".join(f"{k} {v['seconds']:.0f} s" for k, v in runs.items())
    print(f"\nTook {seconds}. Everything is in {record.folder}.")
    if so_far(runs):
        record.save("permuted_mnist", figure(runs, name, published(config)))


def so_far(runs: dict[str, Any]) -> dict[str, np.ndarray]:
    """``(seeds, tasks)`` of the methods that learn one task after the other."""
    return {
        method: np.asarray(metrics.average_accuracy_so_far(run["test"]))
        for method, run in runs.items()
        if method not in ("joint", "single")
    }


def published(config: Config) -> dict[str, list[float]]:
    """The authors' data, beside a run of their length."""
    paper = config.data == "tfds" and (config.tasks, config.epochs) == (10, 20)
    return PUBLISHED if paper and not config.held_out else {}


def table(
    runs: dict[str, Any], published: Mapping[str, Sequence[float]] | None = None
) -> str:
    """A row a number of tasks learned, a column a method; the authors' data below."""
    count = max(np.shape(run["test"])[2] for run in runs.values())
    tasks = [str(task) for task in range(1, count + 1)]
    columns = [["tasks", *tasks]]
    for method, run in runs.items():
        cells = [""] * count
        if method in ("joint", "single"):
            cells[-1 if method == "joint" else 0] = cell(
                metrics.average_accuracy(run["test"])
            )
        else:
            cells = [cell(values) for values in so_far({method: run})[method].T]
        columns.append([method, *cells])
    ours = aligned([*zip(*columns, strict=True), *seeds_row(runs)])
    columns = [
        [method, *(f"{x:.4f}" for x in values)]
        for method, values in (published or {}).items()
        if method in runs
    ]
    if not columns:
        return ours
    theirs = aligned([*zip(["the authors'", *tasks], *columns, strict=True)])
    return f"{ours}\n\n{theirs}"


def correlation_table(
    correlated: dict[str, dict[str, np.ndarray]],
    measure: Callable[[np.ndarray], np.ndarray],
) -> str:
    """A row a task, a column a layer of a method."""
    columns = [
        [f"{method}, {layer}", *(f"{x:.3f}" for x in measure(values))]
        for method, layers in correlated.items()
        for layer, values in layers.items()
    ]
    tasks = ["task", *map(str, range(2, len(columns[0]) + 1))]
    return aligned(list(zip(tasks, *columns, strict=True)))


def figure(
    runs: dict[str, Any],
    name: str,
    published: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Fig. 4 of the finished methods, on the test set."""
    controls = {
        method: np.asarray(metrics.average_accuracy(runs[method]["test"]))
        for method in ("single", "joint")
        if method in runs
    }
    return figures.average_accuracy(
        so_far(runs),
        **controls,
        published=published,
        methods=methods_of(runs),
        suptitle=f"Permuted {name}\ntest accuracy, {over_seeds(runs)}",
    )


def correlation_figure(correlated: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Fig. 5 of the methods whose ω was kept."""
    return figures.correlations(
        {
            method: {f"Hidden {layer}": x.mean(0) for layer, x in layers.items()}
            for method, layers in sorted(correlated.items())  # fine-tuning on top
        }
    )


if __name__ == "__main__":
    command.main(Config, "permuted_mnist", run)
