"""Run one method, all its runs at once: an epoch a dispatch, with checkpoints."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.command import Options
from experiments.record import Record, is_first
from si_jax import metrics, sweep
from si_jax.data import Examples
from si_jax.tasks import Task, permute
from si_jax.train import (
    Carry,
    Learner,
    correlations,
    epoch_key,
    init_key,
    permutations_key,
)


class Problem(NamedTuple):
    """The tasks, and the examples they index.

    Attributes:
      train: the training examples.
      test: the examples to evaluate on besides.
      train_tasks: the tasks' training examples, stacked.
      test_tasks: their examples in ``test``.
      stages: what is trained on, one after the other, if not on ``train_tasks``.
      permutations: through how many permutations of the pixels, each run's own, the
        tasks see the examples; 0 as they are.
    """

    train: Examples
    test: Examples
    train_tasks: Task
    test_tasks: Task
    stages: Task | None = None
    permutations: int = 0


class State(NamedTuple):
    """All that a run under way needs to go on, and so what a checkpoint holds.

    Its randomness is a function of seed and position alone.

    Attributes:
      carry: of every run.
      test: float32 ``(runs, stages, tasks)``, accuracies so far, NaN where none yet.
      train: the same on the training examples.
      initial: float32 ``(runs, tasks)``, the untrained networks' test accuracies.
      seconds: wall time so far.
    """

    carry: Carry
    test: np.ndarray
    train: np.ndarray
    initial: np.ndarray
    seconds: np.ndarray


class Method(NamedTuple):
    """One of the methods that an experiment compares.

    Attributes:
      make_learner: from ``strength`` and ``damping``, traced, to the pieces of a run.
      strength: c of eq. 4.
      learns: from the experiment's problem to what this method learns, if another.
      from_scratch: start every task with the run's initial network.
      first_task: a name under which methods share the first task that differ in
        ``strength`` and ``from_scratch`` alone, neither of which matters before the
        first consolidation.
    """

    make_learner: Callable[..., Learner]
    strength: float = 0.0
    learns: Callable[[Problem], Problem] = lambda problem: problem
    from_scratch: bool = False
    first_task: str | None = None


def run_methods(
    config: Any,
    methods: Mapping[str, Method],
    make_problem: Callable[[Any], Problem],
    record: Record,
    summary: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Run the seeds that are missing, method after method, and record them.

    Args:
      config: the experiment's :class:`Options`, with ``seeds`` (runs of each method,
        with the seeds 0, 1, …), ``epochs`` (passes over each task) and ``damping``.
      methods: by name.
      make_problem: from ``config`` to the tasks; not called if all is finished.
      record: keeps the results.
      summary: of a method's name and result, if not the usual one.
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
                method.make_learner,
                {
                    "strength": [method.strength] * len(seeds),
                    "damping": [config.damping] * len(seeds),
                },
                seeds,
                method.learns(problem),
                epochs=config.epochs,
                method=name,
                record=record,
                options=config,
                from_scratch=method.from_scratch,
                first_task=method.first_task,
            )
            record.add(name, result, summary and functools.partial(summary, name))


def run(
    make_learner: Callable[..., Learner],
    hyperparameters: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    problem: Problem,
    *,
    epochs: int,
    method: str,
    record: Record,
    options: Options,
    from_scratch: bool = False,
    first_task: str | None = None,
) -> dict[str, Any]:
    """Train on every task in turn; go on from the last checkpoint if there is one.

    Args:
      make_learner: from (traced) hyperparameters to the pieces of a run.
      hyperparameters: their values in each run.
      seeds: each run's seed.
      problem: the tasks.
      epochs: passes over each task.
      method: the method's name.
      record: keeps metrics and checkpoints.
      options: how often to write checkpoints, how many runs to put side by side.
      from_scratch: start every task with the run's initial network.
      first_task: the name under which the first task's checkpoints and metrics are
        kept, and found if another method has left them; ``method`` by default.

    Returns:
      Accuracies ``test`` and ``train`` ``(runs, stages, tasks)`` and ``initial``
      ``(runs, tasks)``, ``seconds`` of wall time, compilation and a shared first task
      included, and, where ω of the tasks is kept, its ``correlations`` ``{parameter:
      (runs, tasks, tasks)}``.
    """
    group = f"{min(seeds)}-{max(seeds)}"
    mesh = sweep.mesh(len(seeds))
    missing = -len(seeds) % mesh.size  # made up by repeating the last run

    def to_devices(tree):
        def pad(x):
            return np.concatenate([x, x[-1:].repeat(missing, axis=0)])

        return sweep.spread(jax.tree.map(pad, tree), mesh)

    def to_host(tree):
        """Without what was made up, so that a checkpoint fits any number of devices."""
        return jax.tree.map(lambda x: x[: len(seeds)], sweep.gather(tree))

    def compiled(piece, mapped, donate=False):
        def of_one_run(*arguments):
            values = arguments[mapped - 1]
            rest = arguments[: mapped - 1] + arguments[mapped:]
            return piece(make_learner(**values), *rest)

        return sweep.over_runs(
            of_one_run,
            mesh,
            mapped=mapped,
            donate=donate,
            max_parallel=options.max_parallel,
        )

    def seen(examples, seed):
        if not problem.permutations:
            return examples
        key = permutations_key(jax.random.key(seed))
        return permute(examples, key, problem.permutations)

    def in_epoch(piece):
        def of_one_run(learner, carry, seed, examples, tasks, number, i):
            task = jax.tree.map(lambda x: x[number], tasks)
            key = epoch_key(jax.random.key(seed), number, i)
            return getattr(learner, piece)(carry, seen(examples, seed), task, key)

        return compiled(of_one_run, 3, donate=True)

    def evaluated(learner, carry, seed, examples, tasks):
        return learner.evaluate(carry, seen(examples, seed), tasks)

    init = compiled(lambda learner, s: learner.init(init_key(jax.random.key(s))), 2)
    epoch, finish = in_epoch("epoch"), in_epoch("finish")
    evaluate = compiled(evaluated, 3)

    own = to_devices(np.asarray(seeds, np.uint32))
    values = to_devices(
        {name: np.asarray(v, np.float32) for name, v in hyperparameters.items()}
    )
    examples, tasks, stages = sweep.replicate(
        (
            {"test": problem.test, "train": problem.train},
            {"test": problem.test_tasks, "train": problem.train_tasks},
            problem.stages or problem.train_tasks,
        ),
        mesh,
    )
    count = len(stages.size)
    total = count * epochs

    start = time.perf_counter()
    carry = init(own, values)
    initial = to_host(evaluate(carry, own, values, examples["test"], tasks["test"]))
    nothing = np.full((len(seeds), count, initial.shape[-1]), np.nan, np.float32)
    none = np.zeros((), np.float32)
    state = State(to_host(carry), nothing, nothing.copy(), initial, none)
    first_task = first_task or method
    position, state = (
        record.checkpoints(f"{method} seeds {group}").restore(state)
        or record.checkpoints(f"{first_task} seeds {group}").restore(state)
        or (0, state)
    )
    carry, *rest = state
    state = State(to_devices(carry), *map(np.array, rest))  # writable
    for name in (first_task, method):
        record.rewind(name, group, position)
    start -= float(state.seconds)

    with tqdm(
        total=total,
        initial=position,
        desc=method,
        unit="epoch",
        disable=None if jax.process_index() == 0 else True,
    ) as bar:
        while position < total:
            number, i = divmod(position, epochs)
            name = method if number else first_task
            if from_scratch and i == 0:
                state = state._replace(carry=init(own, values))
            carry, report = epoch(
                state.carry, own, values, examples["train"], stages, number, i
            )
            state, report = state._replace(carry=carry), to_host(report)
            log = {"task": number, "epoch": i, **report._asdict()}
            record.log(method=name, seeds=group, position=position, **log)
            position += 1
            ends = position % epochs == 0
            if ends:
                carry = finish(
                    state.carry, own, values, examples["train"], stages, number, epochs
                )
                state = state._replace(carry=carry)
                for split, rows in (("test", state.test), ("train", state.train)):
                    accuracy = evaluate(
                        carry, own, values, examples[split], tasks[split]
                    )
                    rows[:, number] = to_host(accuracy)
            if ends or position % options.checkpoint_every == 0:
                seconds = np.asarray(time.perf_counter() - start, np.float32)
                state = state._replace(seconds=seconds)
                kept = state._replace(carry=to_host(state.carry))
                record.checkpoints(f"{name} seeds {group}").save(position, kept)
            bar.update()
            bar.set_postfix_str(
                f"task {number + 1}/{count}, accuracy {report.accuracy.mean():.3f}"
                + ("" if from_scratch else _so_far(state.test, position // epochs))
            )
            if ends and bar.disable and is_first():
                took = time.perf_counter() - start
                so_far = "" if from_scratch else _so_far(state.test, number + 1)
                print(
                    f"{method}: task {number + 1}/{count}{so_far}, {took:.0f} s",
                    flush=True,
                )
    result = {
        "test": state.test,
        "train": state.train,
        "initial": state.initial,
        "seconds": round(float(state.seconds), 1),
    }
    if state.carry.path_integrals is not None:
        correlate = sweep.over_runs(
            correlations, mesh, max_parallel=options.max_parallel
        )
        result["correlations"] = to_host(correlate(state.carry))
    return result


def _so_far(test: np.ndarray, finished: int) -> str:
    """The average test accuracy over the tasks that are finished."""
    if not finished:
        return ""
    matrix = test[:, :finished, : finished if test.shape[1] > 1 else None]
    return f", tasks so far {metrics.average_accuracy(matrix).mean():.3f} (test)"
