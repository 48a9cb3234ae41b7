"""The pieces of a run, compiled for all its seeds at once."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data.tasks import permute
from experiments.engine.run import Run
from experiments.training.loop import (
    Carry,
    Epoch,
    Learner,
    correlations,
    epoch_key,
    init_key,
    permutations_key,
)
from si_jax import sweep


class Pieces:
    """A run's learner, compiled for its seeds; what they share is on the devices.

    Args:
      run: what to train.
      max_parallel: how many of one device's seeds go side by side.

    Attributes:
      stages: how many there are.
      second: what the results call the evaluation on ``"train"``.
    """

    def __init__(self, run: Run, max_parallel: int | None = None):
        problem, self._count = run.problem(), len(run.seeds)
        self._mesh = sweep.mesh(self._count)
        self._program = functools.partial(
            _program, run.make_learner, self._mesh, problem.permutations, max_parallel
        )
        stages = problem.stages or problem.train_tasks
        self.stages, self.second = len(jax.tree.leaves(stages)[0]), problem.second
        # Each by itself, so that programs do not depend on how many there are.
        each = [jax.tree.map(lambda x, k=k: x[k], stages) for k in range(self.stages)]
        self._examples, self._stages, self._data = sweep.replicate(
            (
                problem.train,
                each,
                {
                    "test": (problem.test, problem.test_tasks),
                    "train": (problem.train, problem.train_tasks),
                },
            ),
            self._mesh,
        )
        self._active = [None] * (self.stages + 1)
        if problem.growing:
            outputs = np.asarray(stages.classes)
            self._active = [*outputs, np.zeros_like(outputs[0])]  # none at stage -1
        self._per_run = self._of(run)

    def _of(self, run: Run) -> Any:
        return self.to_devices((np.asarray(run.seeds, np.uint32), run.values()))

    def of(self, run: Run) -> "Pieces":
        """The same, of a run that differs in its seeds' hyperparameters alone."""
        other = copy.copy(self)
        other._per_run = self._of(run)
        return other

    def init(self) -> Carry:
        """The untrained networks."""
        return self._program("init")(self._per_run)

    def epoch(self, carry: Carry, stage: int, epoch: int) -> tuple[Carry, Epoch]:
        """A pass over a stage; donates the carry."""
        return self._on_stage("epoch", carry, stage, epoch)

    def finish(self, carry: Carry, stage: int, epoch: int) -> Carry:
        """What happens at a stage's end; likewise."""
        return self._on_stage("finish", carry, stage, epoch)

    def _on_stage(self, piece: "Piece", carry: Carry, stage: int, epoch: int) -> Any:
        program, task = self._program(piece), self._stages[stage]
        return program(carry, self._per_run, self._examples, task, stage, epoch)

    def evaluate(
        self, carry: Carry, split: Literal["test", "train"], stage: int
    ) -> np.ndarray:
        """Accuracies ``(runs, tasks)`` after a stage; -1 before the first."""
        program, data = self._program("evaluate"), self._data[split]
        return self.to_host(program(carry, self._per_run, *data, self._active[stage]))

    def correlate(self, carry: Carry) -> dict[str, np.ndarray]:
        """Of ω: ``{parameter: (runs, tasks, tasks)}``."""
        return self.to_host(self._program("correlate")(carry))

    def to_devices(self, tree: Any) -> Any:
        """Share out arrays with a first axis over the runs."""
        return sweep.spread(tree, self._mesh)

    def to_host(self, tree: Any) -> Any:
        """Gather them."""
        return sweep.gather(tree, self._count)


Piece = Literal["init", "epoch", "finish", "evaluate", "correlate"]


@functools.lru_cache(maxsize=160)
def _program(
    make_learner: Callable[..., Learner],
    mesh: Mesh,
    permutations: int,
    max_parallel: int | None,
    piece: Piece,
) -> Callable[..., Any]:
    """For all problems of one shape: it is compiled once."""

    def of_all(function, mapped=2, donate=False):
        """``function(learner, seed, …)`` of every run's carry and what all share."""

        def of_one(*arguments):
            *carry, (seed, hyperparameters) = arguments[:mapped]
            learner = make_learner(**hyperparameters)
            return function(learner, seed, *carry, *arguments[mapped:])

        return sweep.over_runs(
            of_one, mesh, mapped=mapped, donate=donate, max_parallel=max_parallel
        )

    def seen(examples, seed):
        if not permutations:
            return examples
        return permute(examples, permutations_key(jax.random.key(seed)), permutations)

    def on_stage(learner, seed, carry, examples, task, number, i):
        key = epoch_key(jax.random.key(seed), number, i)
        return getattr(learner, piece)(carry, seen(examples, seed), task, key)

    def evaluated(learner, seed, carry, examples, tasks, active):
        if active is not None:
            tasks = tasks._replace(classes=tasks.classes | active[None])
        return learner.evaluate(carry, seen(examples, seed), tasks)

    def begun(learner, seed):
        return learner.init(init_key(jax.random.key(seed)))

    match piece:
        case "init":
            return of_all(begun, mapped=1)
        case "epoch" | "finish":
            return of_all(on_stage, donate=True)
        case "evaluate":
            return of_all(evaluated)
        case "correlate":
            return sweep.over_runs(correlations, mesh, max_parallel=max_parallel)
