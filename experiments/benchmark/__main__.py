"""What Synaptic Intelligence costs: ``python -m experiments.benchmark``."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmark import runs
from experiments.benchmark.config import Config
from experiments.benchmark.findings import figure, summarize, table
from experiments.benchmark.steps import (
    CALLS,
    LARGE,
    time_boundary,
    time_calls,
    time_convolutions,
    time_net,
    time_update,
)
from experiments.engine import command
from experiments.engine.record import Record, is_first
from experiments.split_mnist import NAMES

RUNS = "Whole runs a second"


def run(config: Config) -> None:
    """Time what is not timed yet; print a table, draw the ratios."""
    record = Record("benchmark", config)
    jax.config.update("jax_enable_compilation_cache", False)  # to time compilation
    todo: dict[str, Callable[[Config], dict[str, Any]]] = {
        name: functools.partial(time_net, name) for name in config.nets
    }
    todo |= {
        f"{name}, {CALLS}": functools.partial(time_calls, name) for name in config.nets
    }
    if config.convolutions:
        todo["convolutions"] = time_convolutions
    wide, narrow = "permuted MNIST", "narrow MNIST"
    todo["boundary"] = functools.partial(time_boundary, wide)
    todo["update"] = functools.partial(time_update, wide)
    if narrow in config.nets:
        todo[f"{narrow}, boundary"] = functools.partial(time_boundary, narrow)
        todo[f"{narrow}, update"] = functools.partial(time_update, narrow)
    if config.large:
        todo[LARGE] = functools.partial(time_update, LARGE)
    for name, timing in todo.items():
        if name not in record.runs:
            record.add(name, timing(config), summarize)
    if config.runs and RUNS not in record.runs:
        record.add(RUNS, runs.time_runs(config), lambda _: {})
    if is_first():
        summary = {k: x for k, x in record.content["summary"].items() if x}
        print(table(summary))
        if RUNS in record.runs:
            print(f"\n{RUNS}: split {NAMES[config.data]}, {config.epochs} epochs")
            print(runs.table(record.runs[RUNS]["seconds"]))
        record.save("benchmark", figure(summary))


if __name__ == "__main__":
    command.main(Config, "benchmark", run)
