"""Run one method, all its runs at once: an epoch a dispatch, with checkpoints."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.data import tasks
from experiments.data.tasks import permute
from experiments.engine.command import Options, UserError
from experiments.engine.record import Record, is_first, versions
from experiments.training.loop import (
    Carry,
    Epoch,
    Learner,
    correlations,
    epoch_key,
    init_key,
    permutations_key,
)
from si_jax import metrics, sweep


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
    like = _empty(carry, len(seeds), stages, np.zeros((len(seeds), tasks), np.float32))
    position, state = _restored(record, key, like) or (0, like)
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


def run(pieces: Pieces, *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Train on every task in turn, as :func:`train` does, for the results.

    Returns:
      Accuracies ``test`` and ``train`` (or as :class:`Problem` has it) ``(runs, stages,
      tasks)`` and ``initial`` ``(runs, tasks)``, ``seconds`` of wall time, compilation
      and a shared first task included, and, where ω of the tasks is kept, its
      ``correlations`` ``{parameter: (runs, tasks, tasks)}``.
    """
    state = train(pieces, *arguments, **settings)
    result = {
        "test": state.test,
        pieces.second: state.train,
        "initial": state.initial,
        "seconds": round(float(state.seconds), 1),
    }
    if state.carry.path_integrals is not None:
        result["correlations"] = pieces.correlate(state.carry)
    return result


def train(
    pieces: Pieces,
    hyperparameters: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    *,
    epochs: int,
    method: str,
    record: Record,
    options: Options,
    from_scratch: bool = False,
    first_task: str | None = None,
    given: Mapping[str, Any] | None = None,
    so_far: Callable[[np.ndarray, int], str] | None = None,
) -> State:
    """Train on every task in turn; go on from the last checkpoint if there is one.

    Args:
      pieces: from :func:`compile_pieces`, for as many runs.
      hyperparameters: their values in each run.
      seeds: each run's seed.
      epochs: passes over each task.
      method: the method's name.
      record: keeps metrics and checkpoints.
      options: how often to write checkpoints, how many runs to put side by side.
      from_scratch: start every task with the run's initial network.
      first_task: the name under which the first task's checkpoints and metrics are
        kept, and found if another method has left them; ``method`` by default.
      given: further arguments of the runs' learners, as of :class:`Method`.
      so_far: what to show of ``test`` after so many stages, if not the accuracy.

    Returns:
      The last :class:`State`, its carry on the devices; of a run that was finished
      before, from its checkpoint.
    """
    start = time.perf_counter()
    values = {name: np.asarray(v, np.float32) for name, v in hyperparameters.items()}
    job = _Job(
        method,
        first_task or method,
        f"{min(seeds)}-{max(seeds)}",
        pieces.to_devices((np.asarray(seeds, np.uint32), values | dict(given or {}))),
        pieces.stages,
        epochs,
        from_scratch,
        record,
        so_far or _accuracy_so_far,
    )
    position, state, by = _begin(job, pieces)
    start -= float(state.seconds)
    with _bar(job, position) as bar:
        while position < job.stages * epochs:
            state, report = _train(job, pieces, state, position)
            name = job.name(position)
            position += 1
            ends = position % epochs == 0
            if ends:
                state = _end_task(job, pieces, state, position // epochs - 1)
            if ends or position % options.checkpoint_every == 0:
                seconds = np.asarray(time.perf_counter() - start, np.float32)
                state = state._replace(seconds=seconds)
                kept = state._replace(carry=pieces.to_host(state.carry))
                record.keep_versions({job.key(name), job.key(method)}, by)
                record.checkpoints(job.key(name)).save(position, kept)
            _show(job, bar, state, report, position, time.perf_counter() - start)
    return state


class _Job(NamedTuple):
    """A method's group of seeds, and where its progress is kept."""

    method: str
    first_task: str
    seeds: str
    runs: Any
    stages: int
    epochs: int
    from_scratch: bool
    record: Record
    so_far: Callable[[np.ndarray, int], str]

    def name(self, position: int) -> str:
        """What the epoch at a position is logged and kept under."""
        return self.method if position >= self.epochs else self.first_task

    def key(self, name: str) -> str:
        """Of its checkpoints."""
        return f"{name} seeds {self.seeds}"


def _empty(carry: Carry, runs: int, stages: int, initial: np.ndarray) -> State:
    """The state before the first stage."""
    nothing = np.full((runs, stages, initial.shape[-1]), np.nan, np.float32)
    none = np.zeros((), np.float32)
    return State(carry, nothing, nothing.copy(), initial, none)


def _restored(record: Record, key: str, like: State) -> tuple[int, State] | None:
    """A group's newest checkpoint; one that is another run's is the user's to mend."""
    try:
        return record.checkpoints(key).restore(like)
    except ValueError as error:
        raise UserError(f"{error} Choose another --out, or --overwrite.") from error


def _begin(job: _Job, pieces: Pieces) -> tuple[int, State, list[dict[str, Any]]]:
    """The last checkpoint's position and state, or the untrained networks'.

    Besides, the versions that trained what it holds, and those of now.
    """
    carry = pieces.init(job.runs)
    initial = pieces.evaluate(carry, job.runs, "test", -1)
    state = _empty(pieces.to_host(carry), len(initial), job.stages, initial)
    by, position = [], 0
    for name in (job.method, job.first_task):
        if found := _restored(job.record, job.key(name), state):
            (position, state), by = found, job.record.trained_by(job.key(name))
            break
    for name in (job.first_task, job.method):
        job.record.rewind(name, job.seeds, position)
    now = versions()
    by = by if now in by else [*by, now]
    carry, *rest = state
    state = State(pieces.to_devices(carry), *map(np.array, rest))  # writable
    return position, state, by


def _train(
    job: _Job, pieces: Pieces, state: State, position: int
) -> tuple[State, Epoch]:
    """The epoch at ``position``, logged."""
    number, i = divmod(position, job.epochs)
    start = pieces.init(job.runs) if job.from_scratch and i == 0 else state.carry
    carry, report = pieces.epoch(start, job.runs, number, i)
    report = pieces.to_host(report)
    log = {"task": number, "epoch": i, **report._asdict()}
    job.record.log(method=job.name(position), seeds=job.seeds, position=position, **log)
    return state._replace(carry=carry), report


def _end_task(job: _Job, pieces: Pieces, state: State, number: int) -> State:
    """Consolidate, and evaluate on all tasks."""
    carry = pieces.finish(state.carry, job.runs, number, job.epochs)
    for split, rows in (("test", state.test), ("train", state.train)):
        rows[:, number] = pieces.evaluate(carry, job.runs, split, number)
    return state._replace(carry=carry)


def _bar(job: _Job, position: int) -> tqdm:
    return tqdm(
        total=job.stages * job.epochs,
        initial=position,
        desc=job.method,
        unit="epoch",
        disable=None if is_first() else True,
    )


def _show(
    job: _Job, bar: tqdm, state: State, report: Epoch, position: int, seconds: float
) -> None:
    """Accuracies in the bar; without one, a line at every task's end."""
    number = (position - 1) // job.epochs
    finished = position // job.epochs
    task = f"task {number + 1}/{job.stages}"
    so_far = "" if job.from_scratch else job.so_far(state.test, finished)
    so_far += _diverged(state.test[:, :finished], np.asarray(report.loss))
    bar.update()
    bar.set_postfix_str(f"{task}, accuracy {report.accuracy.mean():.3f}{so_far}")
    if finished == number + 1 and bar.disable and is_first():
        print(f"{job.method}: {task}{so_far}, {seconds:.0f} s", flush=True)


def _diverged(test: np.ndarray, loss: np.ndarray) -> str:
    """How many runs have no numbers any more, in the last stage or the epoch."""
    gone = ~np.isfinite(loss)
    if test.shape[1]:
        gone |= np.isnan(test[:, -1]).any(-1)
    return f", {gone.sum()} of {len(gone)} diverged" if gone.any() else ""


def _accuracy_so_far(test: np.ndarray, finished: int) -> str:
    """The average accuracy over the tasks that are finished, on what is held out."""
    if not finished:
        return ""
    matrix = test[:, :finished, : finished if test.shape[1] > 1 else None]
    mean = metrics.average_accuracy(matrix).mean()
    return f", held-out accuracy so far {mean:.3f}"
