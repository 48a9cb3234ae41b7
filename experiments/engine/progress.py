"""Train on every task in turn, an epoch a dispatch: checkpoints, a log, a bar."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.engine.command import Options, UserError
from experiments.engine.programs import Pieces
from experiments.engine.record import Record, is_first, versions
from experiments.training.loop import Carry, Epoch
from si_jax import metrics


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


def empty(carry: Carry, runs: int, stages: int, initial: np.ndarray) -> State:
    """The state before the first stage."""
    nothing = np.full((runs, stages, initial.shape[-1]), np.nan, np.float32)
    none = np.zeros((), np.float32)
    return State(carry, nothing, nothing.copy(), initial, none)


def restored(record: Record, key: str, like: State) -> tuple[int, State] | None:
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
    state = empty(pieces.to_host(carry), len(initial), job.stages, initial)
    by, position = [], 0
    for name in (job.method, job.first_task):
        if found := restored(job.record, job.key(name), state):
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
