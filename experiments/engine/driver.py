"""Which runs an experiment has to make, one after another, and their records."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.engine.programs import Pieces
from experiments.engine.progress import SoFar, empty, restored, results, train
from experiments.engine.record import Record, is_first
from experiments.engine.run import Run
from experiments.training.loop import Carry, init_key

Summary = Callable[[dict[str, Any]], dict[str, Any]]


def run_all(
    runs: Iterable[Run],
    record: Record,
    summary: Summary | None = None,
    so_far: SoFar | None = None,
) -> None:
    """Run the seeds that are missing, method after method, and record them.

    Args:
      runs: of the experiment's methods.
      record: keeps the results.
      summary: of a result, if not the usual one.
      so_far: what to show while they run, if not the accuracy.
    """
    todo = [(run, record.missing(run.name, len(run.seeds))) for run in runs]
    if is_first() and not any(groups for _, groups in todo):
        print(f"Finished before: the results are those in {record.folder}.")
    for run, groups in todo:
        for seeds in groups:
            group = dataclasses.replace(run, seeds=seeds)
            record.add(run.label, results(group, record, so_far), summary)


def run_grid(
    run: Run,
    axes: Mapping[str, Sequence[float]],
    record: Record,
    summary: Summary | None = None,
) -> np.ndarray:
    """Run every point of a grid with every seed, all at once, unless it is recorded.

    Args:
      run: with the seeds of each point, and the other hyperparameters.
      axes: the values of hyperparameters.
      record: keeps the results, and each run's ``points`` of the grid.
      summary: of the result; the names of its axes by default.

    Returns:
      Accuracies ``(seeds, *axes, stages, tasks)`` on the problem's test examples.
    """
    if run.name not in record.runs:
        rest = {k: [x] for k, x in run.hyperparameters.items() if k not in axes}
        names = ["seed", *axes, *rest]
        every = itertools.product(run.seeds, *axes.values(), *rest.values())
        columns: list[Any] = list(map(list, zip(*every, strict=True)))
        points = dict(zip(names, columns, strict=True))
        seeds, values = points["seed"], {k: points[k] for k in names[1:]}
        every_point = dataclasses.replace(run, seeds=seeds, hyperparameters=values)
        result = results(every_point, record) | {"points": points}
        record.add(run.label, result, summary or (lambda _: {"axes": names}))
    test = np.asarray(record.runs[run.name]["test"])
    return test.reshape(len(run.seeds), *map(len, axes.values()), *test.shape[1:])


def trained(run: Run, record: Record) -> Carry:
    """What a finished run's last checkpoint holds, to go on with.

    If it is gone, the run is trained again.

    Args:
      run: with a group of seeds that were trained together.
      record: keeps the checkpoints.

    Returns:
      The runs' carry, on the host.
    """
    if (carry := kept(run, record)) is not None:
        return carry
    pieces = Pieces(run, record.config.max_parallel)
    return pieces.to_host(train(run, pieces, record).carry)


def kept(run: Run, record: Record) -> Carry | None:
    """The same, or ``None`` if it is gone."""
    problem, values = run.problem(), run.values()

    def init(seed, values):
        return run.make_learner(**values).init(init_key(jax.random.key(seed)))

    seeds = np.asarray(run.seeds, np.uint32)
    # Shapes alone: what a checkpoint is read into.
    carry = jax.eval_shape(jax.vmap(init), seeds, values)
    stages, tasks = (
        len(jax.tree.leaves(x)[0])
        for x in (problem.stages or problem.train_tasks, problem.test_tasks)
    )
    like = empty(carry, len(seeds), stages, np.zeros((len(seeds), tasks), np.float32))
    position, state = restored(record, run.key(), like) or (0, like)
    return jax.device_get(state.carry) if position == stages * run.epochs else None


def after_each_stage(run: Run, record: Record) -> Iterator[Carry]:
    """The carry, on the host, of a run of several stages, which is trained again."""
    pieces = Pieces(run, record.config.max_parallel)
    carry = pieces.init()
    for stage in range(pieces.stages):
        for epoch in range(run.epochs):
            carry, _ = pieces.epoch(carry, stage, epoch)
        carry = pieces.finish(carry, stage, run.epochs)
        yield pieces.to_host(carry)
