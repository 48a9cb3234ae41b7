"""A run as a value: all that its training depends on, and what it is called."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.data import tasks
from experiments.training.loop import Learner


@dataclasses.dataclass(frozen=True)
class Label:
    """What a run is, in fields, which a record keeps; its name is for eyes alone.

    Attributes:
      method: its method.
      strength: c, where the method has one.
      damping: ξ, where it was chosen, too.
      scenario: ``"task"``, ``"domain"`` or ``"class"``, where there are several.
      batch_size: examples a step, where there are several.
      role: ``"grid"`` to choose a strength from, ``"then third"`` on a third text,
        ``"interpolated"`` with what it began with, …; none is the usual one.

    Example:
      >>> from experiments.engine.run import Label
      >>> print(Label("si", 100.0, scenario="class"))
      class: si c=100
      >>> Label.parse("class: si c=100") == Label("si", 100.0, scenario="class")
      True
    """

    method: str
    strength: float | None = None
    damping: float | None = None
    scenario: str | None = None
    batch_size: int | None = None
    role: str | None = None

    def __str__(self) -> str:
        """The name."""
        batch = None if self.batch_size is None else f"batch {self.batch_size}"
        before = "".join(f"{x}: " for x in (self.scenario, batch) if x)
        values = (("c", self.strength), ("ξ", self.damping))
        after = "".join(f" {k}={x:g}" for k, x in values if x is not None)
        return before + self.method + after + (f", {self.role}" if self.role else "")

    @classmethod
    def parse(cls, name: str) -> Self:
        """From the name."""
        number = r"([\d.e+-]+)"
        roles = "grid|then third|interpolated|merged"
        match = re.fullmatch(
            r"(?:(task|domain|class): )?(?:batch (\d+): )?"
            rf"(.+?)(?: c={number})?(?: ξ={number})?(?:, ({roles}))?",
            name,
        )
        assert match is not None, name
        scenario, batch_size, method, strength, damping, role = match.groups()
        return cls(
            method,
            float(strength) if strength else None,
            float(damping) if damping else None,
            scenario,
            int(batch_size) if batch_size else None,
            role,
        )

    def fields(self) -> dict[str, Any]:
        """Those that it has."""
        return {k: x for k, x in dataclasses.asdict(self).items() if x is not None}


def with_fields(runs: Mapping[str, Any]) -> dict[str, Any]:
    """A record's runs; of one that was written before they had fields, by the names.

    What is neither an accuracy nor an importance is no method's, and has none.
    """
    of_methods = {x for x, run in runs.items() if {"test", "layers"} & run.keys()}
    return {
        name: Label.parse(name).fields() | run if name in of_methods else run
        for name, run in runs.items()
    }


class Problem(NamedTuple):
    """The tasks, and the examples they index.

    Attributes:
      train: the training examples, of the kind that the learners take.
      test: the examples to evaluate on besides.
      train_tasks: the tasks' training examples, stacked.
      test_tasks: their examples in ``test``.
      stages: what is trained on, one after the other, if not on ``train_tasks``.
      permutations: through how many permutations of the pixels, each run's own, the
        tasks see the examples; 0 as they are.
      growing: whether the outputs of the stages so far take part in every evaluation,
        besides those of the task it is on, as in class-incremental learning.
      second: what the results call the evaluation on ``train_tasks``.
    """

    train: Any
    test: Any
    train_tasks: Any
    test_tasks: Any
    stages: Any = None
    permutations: int = 0
    growing: bool = False
    second: str = "train"


def at_once(make: Callable[[], Problem]) -> Problem:
    """A problem's tasks as one stage: joint training."""
    problem = make()
    return problem._replace(
        stages=tasks.together(problem.stages or problem.train_tasks)
    )


def nothing(seeds: Sequence[int]) -> Mapping[str, Any]:
    """What is given to most runs."""
    del seeds
    return {}


@dataclasses.dataclass(frozen=True)
class Run:
    """A method on a problem, with several seeds side by side.

    Attributes:
      label: what it is.
      make_learner: from ``hyperparameters`` and what is ``given``, traced, to the
        pieces of a run. Runs with the same one share their compiled programs.
      problem: makes the tasks; not called where all is finished.
      seeds: of each of the runs side by side.
      epochs: passes over each task.
      hyperparameters: by name, a number for all runs or one for each.
      given: from the seeds of some runs to further arguments of ``make_learner``, trees
        of arrays with a first axis over these runs: networks to go on with, say.
      from_scratch: start every task with the run's initial network.
      first_task: a name under which runs share the first task that differ in
        ``strength`` and ``from_scratch`` alone, neither of which matters before the
        first consolidation.
    """

    label: Label
    make_learner: Callable[..., Learner]
    problem: Callable[[], Problem]
    seeds: Sequence[int]
    epochs: int
    hyperparameters: Mapping[str, float | Sequence[float]]
    given: Callable[[Sequence[int]], Mapping[str, Any]] = nothing
    from_scratch: bool = False
    first_task: str | None = None

    def with_strength(self, c: float) -> Self:
        """The same, of another strength, which its label says."""
        label = dataclasses.replace(self.label, strength=c)
        values = {**self.hyperparameters, "strength": c}
        return dataclasses.replace(self, label=label, hyperparameters=values)

    @property
    def name(self) -> str:
        """For eyes, and in the record."""
        return str(self.label)

    @property
    def group(self) -> str:
        """Its seeds, from the first to the last."""
        return f"{min(self.seeds)}-{max(self.seeds)}"

    def key(self, epoch: int | None = None) -> str:
        """Of its checkpoints after all epochs, or with an epoch under way, from 0."""
        return f"{self.name_at(epoch)} seeds {self.group}"

    def name_at(self, epoch: int | None = None) -> str:
        """Under which an epoch is logged and kept: the first task's may be shared."""
        first = epoch is not None and epoch < self.epochs
        return (self.first_task if first else None) or self.name

    def values(self) -> dict[str, Any]:
        """The arguments of ``make_learner``, with a first axis over the runs."""
        each = {
            name: np.broadcast_to(np.asarray(x, np.float32), (len(self.seeds),))
            for name, x in self.hyperparameters.items()
        }
        return each | dict(self.given(self.seeds))
