"""Runs per second against their number: ``python -m experiments.benchmark_sweep``."""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax
from tqdm import tqdm

from experiments import split_mnist
from experiments.engine import command
from experiments.engine.run import Problem
from experiments.engine.tables import aligned
from experiments.engine.text import readable
from experiments.engine.versions import versions
from experiments.training.loop import train
from si_jax import sweep

WAYS = ("one after another", "side by side")
TORCH = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Whole runs of split MNIST per second, by how many are in one program.

    One after another on each device, or side by side (vmap); and in PyTorch, where it
    is installed, with SI as usually written. Compilation is left out; the ways take
    turns, and the median of the repetitions counts.
    """

    data: Literal["tfds", "mnist5k"] = "mnist5k"
    """The digits to train on."""
    runs: tuple[int, ...] = (1, 2, 4, 10)
    """Numbers of runs in one program."""
    epochs: int = 5
    """Passes over each of the five tasks."""
    repetitions: int = 3
    """Timings of each."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(positive=(), at_least_1=("epochs", "repetitions"))
        if not self.runs or min(self.runs) < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}")


def run(config: Config) -> None:
    """Time every number of runs in both ways; print a table, write JSON into --out."""
    setting = split_mnist.Setting(data=config.data, data_dir=config.data_dir)
    problem = split_mnist.make_problem(setting)
    adam = optax.adam(setting.learning_rate)
    make_learner = split_mnist.make_learner(setting, adam)

    def one_run(seed, strength, shared):
        learner = make_learner(strength=strength, damping=1e-3)
        return train(learner, jax.random.key(seed), *shared, epochs=config.epochs)

    programs: dict[tuple[str, int], Callable[[], Any]] = {}
    for count in config.runs:
        mesh = sweep.mesh(count)
        arguments = (
            *sweep.spread((np.arange(count), np.ones(count, np.float32)), mesh),
            sweep.replicate(tuple(problem[:4]), mesh),
        )
        for way, parallel in zip(WAYS, (1, count), strict=True):
            program = sweep.over_runs(one_run, mesh, mapped=2, max_parallel=parallel)
            jax.block_until_ready(program(*arguments))
            programs[way, count] = functools.partial(program, *arguments)
        if importlib.util.find_spec("torch"):
            programs[TORCH, count] = functools.partial(
                in_torch, problem, count, config.epochs
            )
            in_torch(problem, 1, epochs=1)  # to warm up
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in tqdm(range(config.repetitions), disable=None):
        for (way, count), program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            took = time.perf_counter() - start
            times = seconds.setdefault(way, {}).setdefault(str(count), [])
            times.append(round(took, 4))
    print(table(seconds))
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        content = {
            "experiment": "benchmark_sweep",
            "config": {"data": config.data, "epochs": config.epochs},
            "versions": versions(),
            "seconds": seconds,
        }
        path = config.out / "benchmark_sweep.json"
        path.write_text(readable(content))


def in_torch(problem: Problem, count: int, epochs: int) -> list[np.ndarray]:
    """The accuracies of ``count`` runs in PyTorch, one after another."""
    from experiments.networks.torch_si import split_mnist as whole_run

    return [
        whole_run(
            problem.train, problem.test, split_mnist.GROUPS, epochs=epochs, seed=seed
        )
        for seed in range(count)
    ]


def table(seconds: dict[str, dict[str, list[float]]]) -> str:
    """Runs per second, by the median: a row a number of runs, a column a way."""
    rows = [["runs", *seconds]]
    for count in seconds[WAYS[0]]:
        rates = [int(count) / np.median(times[count]) for times in seconds.values()]
        rows.append([count, *(f"{rate:.2f}" for rate in rates)])
    return aligned(rows)


if __name__ == "__main__":
    command.main(Config, "benchmark_sweep", run)
