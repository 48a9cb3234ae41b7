"""Run one method over all seeds, an epoch a dispatch, with progress."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from si_jax import metrics, sweep
from si_jax.data import Examples
from si_jax.tasks import Task
from si_jax.train import Learner, epoch_key, init_key


class Problem(NamedTuple):
    """The tasks, and the examples they index.

    Attributes:
      train: the training examples.
      test: the test examples.
      train_tasks: the tasks' training examples, stacked.
      test_tasks: their test examples.
    """

    train: Examples
    test: Examples
    train_tasks: Task
    test_tasks: Task


def run(
    make_learner: Callable[[jax.Array], Learner],
    strength: float,
    problem: Problem,
    *,
    seeds: int,
    epochs: int,
    name: str,
    log: Callable[..., None],
) -> dict[str, Any]:
    """Train on every task in turn, all seeds at once.

    Args:
      make_learner: from a (traced) strength c to the pieces of a run.
      strength: c of eq. 4.
      problem: the tasks.
      seeds: runs with the seeds 0, …, ``seeds`` − 1.
      epochs: passes over each task.
      name: the method's, for the progress bar.
      log: called with every epoch's measurements.

    Returns:
      Accuracies ``test`` and ``train`` ``(seeds, tasks, tasks)`` and ``initial``
      ``(seeds, tasks)``, and ``seconds`` of wall time, compilation included.
    """
    start = time.perf_counter()
    mesh = sweep.mesh(seeds)

    def compile_piece(piece, **kwargs):
        return sweep.over_runs(piece, mesh, **kwargs)

    init = compile_piece(lambda key, c: make_learner(c).init(init_key(key)), mapped=2)
    epoch = compile_piece(
        lambda carry, key, c, *rest: _epoch(make_learner(c), carry, key, *rest),
        mapped=3,
        donate=True,
    )
    finish = compile_piece(
        lambda carry, c: make_learner(c).finish(carry), mapped=2, donate=True
    )
    evaluate = compile_piece(
        lambda carry, c, *rest: make_learner(c).evaluate(carry, *rest), mapped=2
    )

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    strengths = jnp.full(seeds, strength, jnp.float32)
    train, test, train_tasks, test_tasks = sweep.replicate(problem, mesh)
    count = len(problem.train_tasks.size)

    carry = init(keys, strengths)
    initial = evaluate(carry, strengths, test, test_tasks)
    rows: dict[str, list[np.ndarray]] = {"test": [], "train": []}
    with tqdm(total=count * epochs, desc=name, unit="epoch", disable=None) as bar:
        for number in range(count):
            task = jax.tree.map(lambda x, n=number: x[n], train_tasks)
            for i in range(epochs):
                carry, report = epoch(carry, keys, strengths, train, task, number, i)
                report = jax.device_get(report)
                log(method=name, task=number, epoch=i, **report._asdict())
                bar.update()
                bar.set_postfix_str(
                    f"task {number + 1}/{count}, accuracy {report.accuracy.mean():.3f}"
                    + _so_far(rows["test"])
                )
            carry = finish(carry, strengths)
            rows["test"].append(
                np.asarray(evaluate(carry, strengths, test, test_tasks))
            )
            rows["train"].append(
                np.asarray(evaluate(carry, strengths, train, train_tasks))
            )
    return {
        **{split: np.stack(values, axis=1) for split, values in rows.items()},
        "initial": np.asarray(initial),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _epoch(learner, carry, key, examples, task, number, i):
    return learner.epoch(carry, examples, task, epoch_key(key, number, i))


def _so_far(rows: list[np.ndarray]) -> str:
    """The average test accuracy over the tasks that are finished."""
    if not rows:
        return ""
    done = np.stack(rows, axis=1)[..., : len(rows)]
    return f", tasks so far {metrics.average_accuracy(done).mean():.3f} (test)"
