"""The experiments' commands, each in a process of its own that can be ended at will.

The processes are forked from one that has imported what they need.
"""

import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["experiments.engine.driver", "optax", "tensorflow_datasets"]
)


class End(NamedTuple):
    """A signal that the process sends itself, at the same moment on any machine.

    Attributes:
      signal: which.
      epoch: the epoch of this process, from 1, that is logged before it.
      calls: how many of Python's function calls come between.
    """

    signal: signal.Signals
    epoch: int
    calls: int = 0


class Started:
    """``python -m experiments.NAME ARGUMENTS`` under way."""

    def __init__(self, name, *arguments, out, end=None, cores=None):
        out.parent.mkdir(parents=True, exist_ok=True)
        self._said = [out.with_name(f"{out.name}.{id(self)}.{x}") for x in ("o", "e")]
        arguments = [name, "--out", str(out), *map(str, arguments)]
        self._process = CONTEXT.Process(
            target=_run, args=(arguments, self._said, end, cores)
        )
        self._process.start()

    def wait(self):
        """Its exit status (−9 if it was killed) and what it printed."""
        self._process.join()
        return self._process.exitcode, *(path.read_text() for path in self._said)


def run(*arguments, **more):
    """Start and wait: exit status, output, errors."""
    return Started(*arguments, **more).wait()


def _run(arguments, said, end, cores):
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    # A shell's background jobs ignore Ctrl-C, and their children after them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if cores:
        os.sched_setaffinity(0, cores)
    if end:
        _end_by(end)
    sys.argv = arguments
    os.chdir(Path(__file__).parent.parent)
    runpy.run_module(f"experiments.{arguments[0]}", run_name="__main__")


def _end_by(end):
    from experiments.engine.record import Record

    epochs, calls, log = itertools.count(1), itertools.count(), Record.log

    def count(*_):
        if next(calls) == end.calls:
            sys.setprofile(None)
            threading.setprofile(None)
            os.kill(os.getpid(), end.signal)

    def logged(record, **entry):
        log(record, **entry)
        if next(epochs) == end.epoch:
            threading.setprofile(count)
            sys.setprofile(count)

    Record.log = logged
