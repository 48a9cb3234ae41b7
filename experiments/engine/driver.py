"""Which runs an experiment has to make, method after method, and their records."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.engine.programs import Problem, compile_pieces
from experiments.engine.progress import empty, restored, run, train
from experiments.engine.record import Record, is_first
from experiments.training.loop import (
    Carry,
    Learner,
    init_key,
)


class Method(NamedTuple):
    """One of the methods that an experiment compares.

    Attributes:
      make_learner: from ``strength``, ``damping`` and ``further``, traced, to the
        pieces of a run.
      strength: c of eq. 4.
      learns: from the experiment's problem to what this method learns, if another.
      from_scratch: start every task with the run's initial network.
      first_task: a name under which methods share the first task that differ in
        ``strength`` and ``from_scratch`` alone, neither of which matters before the
        first consolidation.
      further: hyperparameters besides, so that methods share a program.
      given: from the seeds of some runs to further arguments of ``make_learner``, trees
        of arrays with a first axis over these runs: networks to go on with, say.
    """

    make_learner: Callable[..., Learner]
    strength: float = 0.0
    learns: Callable[[Problem], Problem] = lambda problem: problem
    from_scratch: bool = False
    first_task: str | None = None
    further: Mapping[str, float] = {}
    given: Callable[[Sequence[int]], Mapping[str, Any]] = lambda _: {}


def run_methods(
    config: Any,
    methods: Mapping[str, Method],
    make_problem: Callable[[Any], Problem],
    record: Record,
    summary: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
    so_far: Callable[[np.ndarray, int], str] | None = None,
) -> None:
    """Run the seeds that are missing, method after method, and record them.

    Args:
      config: the experiment's :class:`Options`, with ``seeds`` (runs of each method,
        with the seeds 0, 1, …), ``epochs`` (passes over each task) and ``damping``.
      methods: by name.
      make_problem: from ``config`` to the tasks; not called if all is finished.
      record: keeps the results.
      summary: of a method's name and result, if not the usual one.
      so_far: what to show of ``test`` after so many stages, if not the accuracy.
    """
    todo = {name: record.missing(name, config.seeds) for name in methods}
    if any(todo.values()):
        problem = make_problem(config)
    elif is_first():
        print(f"Finished before: the results are those in {record.folder}.")
    for name, groups in todo.items():
        method = methods[name]
        for seeds in groups:
            result = run(
                compile_pieces(
                    method.make_learner,
                    method.learns(problem),
                    len(seeds),
                    config.max_parallel,
                ),
                _hyperparameters(config, method, seeds),
                seeds,
                epochs=config.epochs,
                method=name,
                record=record,
                options=config,
                from_scratch=method.from_scratch,
                first_task=method.first_task,
                given=method.given(seeds),
                so_far=so_far,
            )
            record.add(name, result, summary and functools.partial(summary, name))


def run_grid(
    config: Any,
    name: str,
    make_learner: Callable[..., Learner],
    make_problem: Callable[[], Problem],
    record: Record,
    seeds: Sequence[int],
    axes: Mapping[str, Sequence[float]],
    summary: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> np.ndarray:
    """Run every point of a grid with every seed, all at once, unless it is recorded.

    Args:
      config: the experiment's :class:`Options`, with ``epochs``.
      name: the grid's, in the record.
      make_learner: from ``axes``, traced, to the pieces of a run.
      make_problem: the tasks; not called if the grid is finished.
      record: keeps the results, and each run's ``points`` of the grid.
      seeds: each point's.
      axes: the values of each hyperparameter.
      summary: of the result; the names of its axes by default.

    Returns:
      Accuracies ``(seeds, *axes, stages, tasks)`` on the problem's test examples.
    """
    names = ["seed", *axes]
    if name not in record.runs:
        points = list(zip(*itertools.product(seeds, *axes.values()), strict=True))
        own, *values = points
        result = run(
            compile_pieces(make_learner, make_problem(), len(own), config.max_parallel),
            dict(zip(axes, values, strict=True)),
            own,
            epochs=config.epochs,
            method=name,
            record=record,
            options=config,
        )
        result["points"] = dict(zip(names, map(list, points), strict=True))
        record.add(name, result, summary or (lambda _: {"axes": names}))
    test = np.asarray(record.runs[name]["test"])
    return test.reshape(len(seeds), *map(len, axes.values()), *test.shape[1:])


def _hyperparameters(
    config: Any, method: Method, seeds: Sequence[int]
) -> dict[str, list[float]]:
    values = {"strength": method.strength, "damping": config.damping}
    return {
        name: [value] * len(seeds)
        for name, value in {**values, **method.further}.items()
    }


def trained(
    config: Any,
    name: str,
    method: Method,
    seeds: Sequence[int],
    problem: Problem,
    record: Record,
) -> Carry:
    """What a finished method's last checkpoint holds, to go on with.

    If it is gone, the method is trained again.

    Args:
      config: as of :func:`run_methods`.
      name: the method's name.
      method: the method.
      seeds: a group of its runs that were trained together.
      problem: the experiment's.
      record: keeps the checkpoints.

    Returns:
      The runs' carry, on the host.
    """
    own, given = method.learns(problem), method.given(seeds)
    hyperparameters = _hyperparameters(config, method, seeds)
    values = {k: np.asarray(v, np.float32) for k, v in hyperparameters.items()}

    def init(seed, values):
        return method.make_learner(**values).init(init_key(jax.random.key(seed)))

    carry = jax.eval_shape(
        jax.vmap(init), np.asarray(seeds, np.uint32), values | dict(given)
    )
    stages, tasks = (
        len(jax.tree.leaves(x)[0])
        for x in (own.stages or own.train_tasks, own.test_tasks)
    )
    key = f"{name} seeds {min(seeds)}-{max(seeds)}"
    like = empty(carry, len(seeds), stages, np.zeros((len(seeds), tasks), np.float32))
    position, state = restored(record, key, like) or (0, like)
    if position == stages * config.epochs:
        return jax.device_get(state.carry)
    pieces = compile_pieces(method.make_learner, own, len(seeds), config.max_parallel)
    state = train(
        pieces,
        hyperparameters,
        seeds,
        epochs=config.epochs,
        method=name,
        record=record,
        options=config,
        given=given,
    )
    return pieces.to_host(state.carry)
