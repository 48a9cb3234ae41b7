"""The three scenarios on split MNIST: ``python -m experiments.scenarios``.

The same five pairs of digits, told apart three ways: with the task given, without it
but with the same two outputs for every pair, and as a growing number of classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import si_jax
from experiments import data, figures, split_mnist
from experiments.data import tasks
from experiments.data.images import Examples
from experiments.engine import command, driver, programs
from experiments.engine.driver import Method
from experiments.engine.export import measured
from experiments.engine.programs import Problem
from experiments.engine.record import Record, is_first
from experiments.engine.tables import aligned, best, cell, counts, number, over_seeds
from experiments.networks.models import MLP
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_importance,
    consolidate_sensitivity,
    reset,
)
from experiments.training.classifier import learner
from experiments.training.loop import Boundary, Learner
from si_jax import ewc, metrics

Scenario = Literal["task", "domain", "class"]
Name = Literal["fine-tuning", "l2", "si", "ewc", "online ewc", "mas", "joint"]
SCENARIOS: tuple[Scenario, ...] = ("task", "domain", "class")
GRID_SEEDS = 1_000_000  # from here on, so that the seeds of the test are fresh
TRAIN_EVALUATED = 1000  # of each task's training examples, to evaluate on


@dataclasses.dataclass(frozen=True)
class Config(split_mnist.Setting):
    """Split MNIST in the three scenarios: task-, domain- and class-incremental.

    Each method's strength c is chosen in each scenario on a part of the training set,
    and what is chosen is then trained on all of it, with fresh seeds, and evaluated on
    the test set.
    """

    scenario: tuple[Scenario, ...] = SCENARIOS
    """What to run; more can be added later in the same --out."""
    methods: tuple[Name, ...] = get_args(Name)
    """Likewise."""
    seeds: int = 10
    """Runs of each method, with the seeds 0, 1, …; more can be added later."""
    grid_seeds: int = 2
    """Runs of each strength to choose from, with other seeds."""
    epochs: int = 4
    """Passes over each task."""
    batch_size: int = 128
    """Examples a step."""
    hidden: tuple[int, ...] = (400, 400)
    """Widths of the hidden layers."""
    zero_init_output: bool = False
    """Start the output layer at zero."""
    reset_optimizer: bool = False
    """Start each task with a fresh optimizer."""
    damping: float = 0.1
    """ξ of eq. 5."""
    l2_strengths: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """The values of c to choose from; the importance is 1 a task."""
    si_strengths: tuple[float, ...] = (100.0, 1e3, 1e4, 1e5)
    """Likewise, c of eq. 4."""
    ewc_strengths: tuple[float, ...] = (1e6, 1e8, 1e10, 1e12)
    """Likewise, c = λ/2, of both forms of EWC."""
    mas_strengths: tuple[float, ...] = (0.1, 10.0, 1e3, 1e5)
    """Likewise, c = λ of MAS."""
    importance_examples: int = 500
    """Of each task, for EWC's Fisher information and MAS's sensitivity."""
    held_out: float = 1 / 6
    """The fraction of the training set to choose on."""

    PICKS: ClassVar[tuple[str, ...]] = ("scenario", "methods", "seeds")

    def __post_init__(self):
        """Refuse values that make no sense."""
        super().__post_init__()
        counts = ("seeds", "grid_seeds", "importance_examples")
        self.check(positive=("damping",), at_least_1=counts)
        for name in ("l2", "si", "ewc", "mas"):
            strengths = f"{name}_strengths"
            split_mnist.check_strengths(strengths, getattr(self, strengths))
        for name in ("scenario", "methods"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


# --- The scenarios --------------------------------------------------------------------


class Problems(NamedTuple):
    """Split MNIST to choose on and to test on, in arrays of the same shapes."""

    choice: Problem
    test: Problem


def make_problems(config: Config) -> Problems:
    """The five pairs of digits, each with outputs of its own."""
    digits = data.load("mnist", config.data, config.data_dir)
    held = data.hold_out(digits, config.held_out)
    # What is held out stays behind the rest: as many images, one compiled program.
    images, labels = (
        np.concatenate(x) for x in zip(held.train, held.test, strict=True)
    )
    rows = [
        tasks.split_classes(labels, split_mnist.GROUPS, digits.classes)
        for labels in (
            held.train.labels,
            digits.train.labels,
            held.test.labels,
            digits.test.labels,
        )
    ]
    longest = [max(x.rows.shape[1] for x in pair) for pair in (rows[:2], rows[2:])]
    choice, train, choice_test, test = map(tasks.padded, rows, np.repeat(longest, 2))
    evaluated = functools.partial(tasks.first, count=TRAIN_EVALUATED)
    choose_from = Examples(images, labels)
    return Problems(
        Problem(choose_from, held.test, evaluated(choice), choice_test, choice),
        Problem(digits.train, digits.test, evaluated(train), test, train),
    )


def in_scenario(scenario: Scenario, problem: Problem) -> Problem:
    """The pairs of digits as a scenario has them.

    Args:
      scenario: ``"task"``, where the outputs that take part are the pair's own;
        ``"domain"``, the same two for every pair, for its first and its second digit;
        ``"class"``, those of the pair and of all before it.
      problem: from :func:`make_problems`.
    """

    def with_classes(change: Callable[[jax.Array], jax.Array]) -> Problem:
        stacks = ("train_tasks", "test_tasks", "stages")
        changed = {name: getattr(problem, name) for name in stacks}
        return problem._replace(
            **{k: x._replace(classes=change(x.classes)) for k, x in changed.items()}
        )

    match scenario:
        case "task":
            return problem
        case "class":
            so_far = with_classes(lambda classes: jnp.cumsum(classes, axis=0) > 0)
            return so_far._replace(growing=True)
        case "domain":
            train, test = (
                examples._replace(labels=examples.labels % 2)
                for examples in (problem.train, problem.test)
            )
            both = with_classes(
                lambda classes: jnp.broadcast_to(classes[0], classes.shape)
            )
            return both._replace(train=train, test=test)


# --- The methods ----------------------------------------------------------------------


class Arm(NamedTuple):
    """A method before its strength is chosen.

    Attributes:
      make_learner: the pieces of a run as a function of what may be swept.
      candidates: the strengths to choose from; none if it has none.
      further: which importance, of those methods that differ in it alone.
    """

    make_learner: Callable[..., Learner]
    candidates: tuple[float, ...] = ()
    further: Mapping[str, float] = {}


def arms(config: Config) -> dict[str, Arm]:
    """The methods by name.

    L2, online EWC and MAS have one surrogate loss, c Σ Ω (θ̃ − θ)² with θ̃ the weights at
    the last task's end, and Ω, summed over the tasks, their own: 1 of every weight,
    Fisher information, the outputs' sensitivity. They are one program, and fine-tuning
    is theirs with c = 0. EWC pulls to the weights of each task.
    """
    model = MLP(config.hidden, 10, config.zero_init_output)
    adam = optax.adam(config.learning_rate)
    count = config.importance_examples
    fisher = consolidate_fisher(model, count)
    importances = (
        consolidate_importance(lambda p, *_: jax.tree.map(jnp.ones_like, p), 1),
        fisher,
        consolidate_sensitivity(model, count),
    )

    def pieces(tx: optax.GradientTransformation, *boundary: Boundary) -> Learner:
        fresh = [reset(tx, keep_count=config.keep_count)] * config.reset_optimizer
        return learner(
            model,
            tx,
            (28, 28, 1),
            batch_size=config.batch_size,
            boundary=[*boundary, *fresh],
        )

    def plain(strength: jax.Array, damping: jax.Array) -> Learner:
        del strength, damping
        return pieces(adam)

    def synaptic(strength: jax.Array, damping: jax.Array) -> Learner:
        tx = si_jax.with_synaptic_intelligence(adam, strength, damping)
        return pieces(tx, consolidate)

    def merged(strength: jax.Array, damping: jax.Array) -> Learner:
        del damping
        link = ewc.elastic_weight_consolidation(strength)
        return pieces(optax.chain(link, adam), fisher)

    def summed(
        strength: jax.Array, damping: jax.Array, importance: jax.Array
    ) -> Learner:
        del damping
        link = ewc.elastic_weight_consolidation(strength, decay=1.0)

        def boundary(*arguments):
            which = importance.astype(jnp.int32)
            return jax.lax.switch(which, importances, *arguments)

        return pieces(optax.chain(link, adam), boundary)

    l2, online_ewc, mas = ({"importance": float(i)} for i in range(len(importances)))
    return {
        "fine-tuning": Arm(summed, (), l2),
        "l2": Arm(summed, config.l2_strengths, l2),
        "si": Arm(synaptic, config.si_strengths),
        "ewc": Arm(merged, config.ewc_strengths),
        "online ewc": Arm(summed, config.ewc_strengths, online_ewc),
        "mas": Arm(summed, config.mas_strengths, mas),
        "joint": Arm(plain),
    }


def grid_name(scenario: str, method: str) -> str:
    """Of a method's grid in the record."""
    return f"{scenario}: {method}, grid"


def chosen(
    config: Any,
    grid: str,
    make_learner: Callable[..., Learner],
    make_problem: Callable[[], Problem],
    record: Record,
    strengths: Sequence[float],
    further: Mapping[str, float],
) -> float:
    """The strength that is best on held-out data, by runs with seeds of their own."""
    accuracy = driver.run_grid(
        config,
        grid,
        make_learner,
        make_problem,
        record,
        range(GRID_SEEDS, GRID_SEEDS + config.grid_seeds),
        {
            "strength": strengths,
            "damping": [config.damping],
            **{key: [value] for key, value in further.items()},
        },
    )
    after = np.asarray(metrics.average_accuracy(accuracy))
    return strengths[choose(after.reshape(config.grid_seeds, -1), grid)]


def choose(accuracy: np.ndarray, grid: str = "the grid") -> int:
    """The strength of the best mean: ``(seeds, strengths)`` to an index.

    One of whose seeds diverged is not chosen.
    """
    return best(accuracy.mean(axis=0), grid)


def choices(accuracy: np.ndarray) -> list[str]:
    """A cell a strength of ``(seeds, strengths)``: the mean, the best with a ``*``."""
    cells = [f"{number(x)} " for x in accuracy.mean(axis=0)]
    chosen = choose(accuracy)
    cells[chosen] = cells[chosen].replace(" ", "*")
    return cells


def run(config: Config) -> None:
    """Run what is not finished, all the grids first; then print and draw."""
    record = Record("scenarios", config, default=config.data)
    known = arms(config)
    problems = functools.cache(lambda: make_problems(config))

    def choice_problem(scenario: Scenario) -> Problem:
        return in_scenario(scenario, problems().choice)

    methods: dict[str, Method] = {}
    for scenario in config.scenario:
        for method in config.methods:
            name, c, arm = f"{scenario}: {method}", 0.0, known[method]
            if arm.candidates:
                c = chosen(
                    config,
                    grid_name(scenario, method),
                    arm.make_learner,
                    functools.partial(choice_problem, scenario),
                    record,
                    arm.candidates,
                    arm.further,
                )
                name = f"{name} c={c:g}"
            learns = functools.partial(in_scenario, scenario)
            if method == "joint":
                learns = functools.partial(jointly, scenario)
            methods[name] = Method(arm.make_learner, c, learns, further=arm.further)
    driver.run_methods(config, methods, lambda _: problems().test, record)
    if is_first():
        report(config, record)


def jointly(scenario: Scenario, problem: Problem) -> Problem:
    """All tasks of a scenario at once."""
    return programs.all_at_once(in_scenario(scenario, problem))


# --- What comes of it -----------------------------------------------------------------


def of_scenario(runs: dict[str, Any], scenario: str) -> dict[str, Any]:
    """The finished methods of a scenario, by name, without their grids."""
    names = [x for x in runs if x.startswith(f"{scenario}: ") and "grid" not in x]
    return {name.removeprefix(f"{scenario}: "): runs[name] for name in names}


def report(config: Config, record: Record) -> None:
    """Print and draw the finished methods."""
    runs, name = record.runs, split_mnist.NAMES[config.data]
    found: dict[str, dict[str, Any]] = {s: of_scenario(runs, s) for s in SCENARIOS}
    found = {scenario: of for scenario, of in found.items() if of}
    print("\nHeld-out accuracy after all tasks, mean over the seeds; * is chosen")
    print(choice_table(config, runs))
    every = {(s, name): run for s, of in found.items() for name, run in of.items()}
    print(f"\nSplit {name}: test accuracy after all tasks, " + over_seeds(every))
    print(table(found))
    for scenario, of in found.items():
        print(f"\n{scenario.capitalize()}-incremental, test")
        print(measures_table(of))
    seconds = sum(run["seconds"] for run in runs.values())
    print(f"\nTook {seconds:.0f} s. Everything is in {record.folder}.")
    record.save("scenarios", figure(found, name, over_seeds(every)))


def choice_table(config: Config, runs: dict[str, Any]) -> str:
    """A row a method and strength, a column a scenario: accuracy, the best with a *."""
    rows = [["", *SCENARIOS]]
    for method, arm in arms(config).items():
        names = [f"{method} c={c:g}" for c in arm.candidates]
        columns = []
        for scenario in SCENARIOS:
            cells = [""] * len(names)
            if names and (grid := runs.get(grid_name(scenario, method))):
                after = np.asarray(metrics.average_accuracy(grid["test"]))
                cells = choices(after.reshape(-1, len(names)))
            columns.append(cells)
        rows += map(list, zip(names, *columns, strict=True))
    return aligned(shown(rows))


def shown(rows: list[list[str]]) -> list[list[str]]:
    """A table without its empty rows and columns."""
    columns = [x for x in zip(*rows, strict=True) if any(x[1:])]
    return [list(row) for row in zip(*columns, strict=True) if any(row[1:])]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a method, a column a scenario: accuracy averaged over the tasks.

    The last row is how many seeds they have, where they differ.
    """
    rows = [["", *found]]
    for method in Config().methods:
        row: list[str] = [method]
        for of in found.values():
            named = [run for name, run in of.items() if name.split(" c=")[0] == method]
            row += [cell(metrics.average_accuracy(x["test"])) for x in named] or [""]
        rows.append(row)
    seeds = [counts(of) for of in found.values()]
    if len(set(seeds)) > 1 or "to" in seeds[0]:
        rows.append(["n", *seeds])
    return aligned([row for row in rows if any(row[1:])])


def measures_table(runs: Mapping[str, Any]) -> str:
    """A row a method, a column a measure; intransigence is beside joint training."""
    rows: list[dict[str, np.ndarray]] = []
    for run in runs.values():
        found = measured(run, "test")
        if len(found) > 1 and "joint" in runs:
            test = np.asarray(run["test"])
            reference = np.asarray(runs["joint"]["test"]).mean((0, 1))
            reference = np.broadcast_to(reference, (len(test), len(reference)))
            found["intransigence"] = np.asarray(metrics.intransigence(test, reference))
        rows.append(found)
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [method, *(cell(row[name]) if name in row else "" for name in names)]
        for method, row in zip(runs, rows, strict=True)
    ]
    return aligned([["", *(name.replace("_", " ") for name in names)], *cells])


def figure(found: Mapping[str, Mapping[str, Any]], name: str, over: str) -> Figure:
    """A panel a scenario, on the test set."""
    return figures.scenarios(
        {
            f"{scenario.capitalize()}-incremental": {
                method.split(" c=")[0]: np.asarray(run["test"])
                for method, run in of.items()
            }
            for scenario, of in found.items()
        },
        suptitle=f"Split {name}, test accuracy, {over}",
    )


if __name__ == "__main__":
    command.main(Config, "scenarios", run)
