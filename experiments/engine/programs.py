"""A run's pieces, compiled for many runs at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.data import tasks
from experiments.data.tasks import permute
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


def all_at_once(problem: Problem) -> Problem:
    """The tasks as one stage: joint training."""
    return problem._replace(
        stages=tasks.together(problem.stages or problem.train_tasks)
    )


class Pieces(NamedTuple):
    """A learner's pieces, compiled for many runs; what they share is on the devices.

    The runs' seeds and hyperparameters are ``runs``, by ``to_devices``.

    Attributes:
      init: ``runs → carry``.
      epoch: ``(carry, runs, stage, epoch) → (carry, Epoch)``; donates the carry.
      finish: ``(carry, runs, stage, epoch) → carry``; likewise.
      evaluate: ``(carry, runs, "test" or "train", stage) → accuracy (runs, tasks)``
        after a stage; -1 before the first.
      correlate: ``carry → {parameter: (runs, tasks, tasks)}``, of ω.
      to_devices: shares out arrays with a first axis over the runs.
      to_host: gathers them.
      stages: how many there are.
      second: what the results call the evaluation on ``"train"``.
    """

    init: Callable[[Any], Carry]
    epoch: Callable[[Carry, Any, int, int], tuple[Carry, Epoch]]
    finish: Callable[[Carry, Any, int, int], Carry]
    evaluate: Callable[[Carry, Any, str, int], np.ndarray]
    correlate: Callable[[Carry], dict[str, np.ndarray]]
    to_devices: Callable[[Any], Any]
    to_host: Callable[[Any], Any]
    stages: int
    second: str


def compile_pieces(
    make_learner: Callable[..., Learner],
    problem: Problem,
    runs: int,
    max_parallel: int | None = None,
) -> Pieces:
    """Compile the pieces of a run for ``runs`` of them at once.

    Args:
      make_learner: from (traced) hyperparameters to the pieces of a run.
      problem: the tasks.
      runs: how many.
      max_parallel: how many of one device go side by side.
    """
    mesh = sweep.mesh(runs)
    programs = _programs(make_learner, mesh, problem.permutations, max_parallel)
    stages = problem.stages or problem.train_tasks
    count = len(jax.tree.leaves(stages)[0])
    # Each by itself, so that programs do not depend on how many there are.
    each = [jax.tree.map(lambda x, k=k: x[k], stages) for k in range(count)]
    (examples, each), data = sweep.replicate(
        (
            (problem.train, each),
            {
                "test": (problem.test, problem.test_tasks),
                "train": (problem.train, problem.train_tasks),
            },
        ),
        mesh,
    )
    active = [None] * (count + 1)
    if problem.growing:
        outputs = np.asarray(stages.classes)
        active = [*outputs, np.zeros_like(outputs[0])]  # none at stage -1

    def on_stage(program, carry, own, number, i):
        return program(carry, own, examples, each[number], number, i)

    to_host = functools.partial(sweep.gather, runs=runs)
    return Pieces(
        init=programs.init,
        epoch=functools.partial(on_stage, programs.epoch),
        finish=functools.partial(on_stage, programs.finish),
        evaluate=lambda carry, own, on, stage: to_host(
            programs.evaluate(carry, own, *data[on], active[stage])
        ),
        correlate=lambda carry: to_host(programs.correlate(carry)),
        to_devices=functools.partial(sweep.spread, mesh=mesh),
        to_host=to_host,
        stages=count,
        second=problem.second,
    )


class _Programs(NamedTuple):
    """What :class:`Pieces` call, before they are bound to a problem."""

    init: Callable[..., Any]
    epoch: Callable[..., Any]
    finish: Callable[..., Any]
    evaluate: Callable[..., Any]
    correlate: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def _programs(
    make_learner: Callable[..., Learner],
    mesh: Mesh,
    permutations: int,
    max_parallel: int | None,
) -> _Programs:
    """Of all problems of one shape: each is compiled once."""

    def of_all(piece, mapped=2, donate=False):
        """``piece(learner, seed, …)`` of every run's carry and what all share."""

        def of_one(*arguments):
            *carry, (seed, hyperparameters) = arguments[:mapped]
            learner = make_learner(**hyperparameters)
            return piece(learner, seed, *carry, *arguments[mapped:])

        return sweep.over_runs(
            of_one, mesh, mapped=mapped, donate=donate, max_parallel=max_parallel
        )

    def seen(examples, seed):
        if not permutations:
            return examples
        return permute(examples, permutations_key(jax.random.key(seed)), permutations)

    def on_stage(learner, seed, carry, examples, task, number, i, piece):
        key = epoch_key(jax.random.key(seed), number, i)
        return getattr(learner, piece)(carry, seen(examples, seed), task, key)

    def evaluated(learner, seed, carry, examples, tasks, active):
        if active is not None:
            tasks = tasks._replace(classes=tasks.classes | active[None])
        return learner.evaluate(carry, seen(examples, seed), tasks)

    epoch, finish = (
        of_all(functools.partial(on_stage, piece=piece), donate=True)
        for piece in ("epoch", "finish")
    )
    return _Programs(
        of_all(lambda learner, seed: learner.init(init_key(jax.random.key(seed))), 1),
        epoch,
        finish,
        of_all(evaluated),
        sweep.over_runs(correlations, mesh, max_parallel=max_parallel),
    )
