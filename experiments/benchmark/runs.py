"""Whole runs of split MNIST per second, by how many are in one program."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments import split_mnist
from experiments.benchmark.config import Config
from experiments.engine.run import Problem
from experiments.engine.tables import aligned
from experiments.engine.timing import Program, take_turns
from experiments.training.loop import train
from si_jax import sweep

WAYS = ("one after another", "side by side")
TORCH = "PyTorch"


def time_runs(config: Config) -> dict[str, Any]:
    """Seconds of some runs on the devices, by way and number of runs.

    One after another on each device, or side by side (vmap); and in PyTorch, where it
    is installed, with SI as usually written.
    """
    setting = split_mnist.Setting(data=config.data, data_dir=config.data_dir)
    problem = split_mnist.make_problem(setting)
    adam = optax.adam(setting.learning_rate)
    make_learner = split_mnist.make_learner(setting, adam)

    def one_run(seed, strength, shared):
        learner = make_learner(strength=strength, damping=1e-3)
        return train(learner, jax.random.key(seed), *shared, epochs=config.epochs)

    programs: dict[tuple[str, str], Program] = {}

    def add(way: str, count: int, call: Callable[[], Any]) -> None:
        def run():
            return jax.block_until_ready(call())

        programs[way, str(count)] = Program(run, 1, {})

    for count in config.runs:
        mesh = sweep.mesh(count)
        arguments = (
            *sweep.spread((np.arange(count), np.ones(count, np.float32)), mesh),
            sweep.replicate(tuple(problem[:4]), mesh),
        )
        for way, parallel in zip(WAYS, (1, count), strict=True):
            program = sweep.over_runs(one_run, mesh, mapped=2, max_parallel=parallel)
            add(way, count, functools.partial(program, *arguments))
        if importlib.util.find_spec("torch"):
            whole = functools.partial(in_torch, problem, count, config.epochs)
            add(TORCH, count, whole)
    named = {f"{count} {way}": x for (way, count), x in programs.items()}
    times = take_turns(named, min(config.repetitions, 3))  # one takes seconds
    seconds: dict[str, dict[str, list[float]]] = {}
    for (way, number), values in zip(programs, times.values(), strict=True):
        seconds.setdefault(way, {})[number] = [round(x / 1e3, 4) for x in values]
    return {"seconds": seconds}


def in_torch(problem: Problem, count: int, epochs: int) -> list[np.ndarray]:
    """The accuracies of ``count`` runs in PyTorch, one after another."""
    from experiments.networks.torch_si import split_mnist as whole_run

    return [
        whole_run(
            problem.train, problem.test, split_mnist.GROUPS, epochs=epochs, seed=seed
        )
        for seed in range(count)
    ]


def table(seconds: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Runs per second, by the median: a row a number of runs, a column a way."""
    rows = [["runs", *seconds]]
    for count in seconds[WAYS[0]]:
        rates = [int(count) / np.median(times[count]) for times in seconds.values()]
        rows.append([count, *(f"{rate:.2f}" for rate in rates)])
    return aligned(rows)
