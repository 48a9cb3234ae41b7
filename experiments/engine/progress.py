"""Train on every task in turn, an epoch a dispatch: checkpoints, a log, a bar."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.engine.command import UserError
from experiments.engine.programs import Pieces
from experiments.engine.record import Record, is_first
from experiments.engine.run import Run
from experiments.engine.versions import versions
from experiments.training.loop import Carry, Epoch
from si_jax import metrics

SoFar = Callable[[np.ndarray, int], str]
"""What to show of ``test`` after so many stages."""


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


def results(run: Run, record: Record, so_far: SoFar | None = None) -> dict[str, Any]:
    """Train on every task in turn, as :func:`train` does, for the results.

    Returns:
      Accuracies ``test`` and ``train`` (or as :class:`Problem` has it) ``(runs, stages,
      tasks)`` and ``initial`` ``(runs, tasks)``, ``seconds`` of wall time, compilation
      and a shared first task included, and, where ω of the tasks is kept, its
      ``correlations`` ``{parameter: (runs, tasks, tasks)}``.
    """
    pieces = Pieces(run, record.config.max_parallel)
    state = train(run, pieces, record, so_far)
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
    run: Run, pieces: Pieces, record: Record, so_far: SoFar | None = None
) -> State:
    """Train on every task in turn; go on from the last checkpoint if there is one.

    Args:
      run: what to train.
      pieces: of it, compiled.
      record: keeps metrics and checkpoints.
      so_far: what to show of the evaluation, if not the accuracy.

    Returns:
      The last :class:`State`, its carry on the devices; of a run that was finished
      before, from its checkpoint.
    """
    start, epochs = time.perf_counter(), run.epochs
    position, state, by = _begin(run, pieces, record)
    start -= float(state.seconds)
    with _bar(run, pieces, position) as bar:
        while position < pieces.stages * epochs:
            state, report = _train(run, pieces, record, state, position)
            # Of the epoch that was trained: the first task's checkpoints may be shared.
            key = run.key(position)
            position += 1
            ends = position % epochs == 0
            if ends:
                state = _end_task(run, pieces, state, position // epochs - 1)
            if ends or position % record.config.checkpoint_every == 0:
                seconds = np.asarray(time.perf_counter() - start, np.float32)
                state = state._replace(seconds=seconds)
                kept = state._replace(carry=pieces.to_host(state.carry))
                record.keep_versions({key, run.key()}, by)
                record.checkpoints(key).save(position, kept)
            _show(run, bar, state, report, position, so_far or _accuracy_so_far)
    return state


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


def _begin(
    run: Run, pieces: Pieces, record: Record
) -> tuple[int, State, list[dict[str, Any]]]:
    """The last checkpoint's position and state, or the untrained networks'.

    Besides, the versions that trained what it holds, and those of now.
    """
    carry = pieces.init()
    initial = pieces.evaluate(carry, "test", -1)
    state = empty(pieces.to_host(carry), len(initial), pieces.stages, initial)
    by, position = [], 0
    for key in (run.key(), run.key(0)):
        if kept := restored(record, key, state):
            (position, state), by = kept, record.trained_by(key)
            break
    for name in (run.name_at(0), run.name):
        record.rewind(name, run.group, position)
    now = versions()
    by = by if now in by else [*by, now]
    carry, *rest = state
    state = State(pieces.to_devices(carry), *map(np.array, rest))  # writable
    return position, state, by


def _train(
    run: Run, pieces: Pieces, record: Record, state: State, position: int
) -> tuple[State, Epoch]:
    """The epoch at ``position``, logged."""
    number, i = divmod(position, run.epochs)
    start = pieces.init() if run.from_scratch and i == 0 else state.carry
    carry, report = pieces.epoch(start, number, i)
    report = pieces.to_host(report)
    log = {"task": number, "epoch": i, **report._asdict()}
    name = run.name_at(position)
    record.log(method=name, seeds=run.group, position=position, **log)
    return state._replace(carry=carry), report


def _end_task(run: Run, pieces: Pieces, state: State, number: int) -> State:
    """Consolidate, and evaluate on all tasks."""
    carry = pieces.finish(state.carry, number, run.epochs)
    state.test[:, number] = pieces.evaluate(carry, "test", number)
    state.train[:, number] = pieces.evaluate(carry, "train", number)
    return state._replace(carry=carry)


def _bar(run: Run, pieces: Pieces, position: int) -> tqdm:
    return tqdm(
        total=pieces.stages * run.epochs,
        initial=position,
        desc=run.name,
        unit="epoch",
        disable=None if is_first() else True,
    )


def _show(
    run: Run,
    bar: tqdm,
    state: State,
    report: Epoch,
    position: int,
    so_far: SoFar,
) -> None:
    """Accuracies in the bar; without one, a line at every task's end."""
    number, finished = (position - 1) // run.epochs, position // run.epochs
    task = f"task {number + 1}/{state.test.shape[1]}"
    remark = "" if run.from_scratch else so_far(state.test, finished)
    remark += _diverged(state.test[:, :finished], np.asarray(report.loss))
    bar.update()
    bar.set_postfix_str(f"{task}, accuracy {report.accuracy.mean():.3f}{remark}")
    if finished == number + 1 and bar.disable and is_first():
        print(f"{run.name}: {task}{remark}, {state.seconds:.0f} s", flush=True)


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
