"""Programs timed in turn, and what is known of them before they run."""

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm


def compiles_with(options: Mapping[str, Any]) -> bool:
    """Whether this version of XLA knows the options; it refuses what it does not."""
    program = jax.jit(lambda x: x).lower(jnp.zeros(()))
    try:
        program.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Program(NamedTuple):
    """What is timed, and what is known of it before.

    Attributes:
      run: takes all its steps, and returns the state.
      steps: how many.
      facts: seconds it took to compile, bytes in use at the peak, bytes of the
        optimizer's state; a parameter, the bytes that its passes over memory access (of
        a loop: before it and in one step) and the copies that a step makes.
    """

    run: Callable[[], Any]
    steps: int
    facts: Mapping[str, float]


def stateful(
    compiled: jax.stages.Compiled,
    state: Any,
    *shared: Any,
    steps: int = 1,
    calls: int = 1,
) -> Program:
    """A compiled program that hands its result, the state, to its next call."""
    facts: dict[str, float] = {}
    if (memory := compiled.memory_analysis()) is not None:  # not every backend says
        facts["peak_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )

    def run():
        nonlocal state
        for _ in range(calls):
            state = jax.block_until_ready(compiled(state, *shared))
        return state

    return Program(run, steps, facts)


def copies(
    program: str, params: optax.Params, *, in_loop: bool = False
) -> float | None:
    """How often a compiled program copies the parameters, or arrays shaped like them.

    Args:
      program: optimized HLO.
      params: the parameters.
      in_loop: leave out what is done once, before and after the program's loop.

    Returns:
      Elements of the copies, by the number of parameters; ``None`` of a text in which
      no result has the parameters' shapes, which is not written as it is read here.
    """
    shapes = {x.shape for x in jax.tree.leaves(params)}
    computations = program.split("\n\n")
    if in_loop:
        computations = [x for x in computations if not x.startswith("ENTRY")]
    results = re.findall(r"= \w+\[([\d,]*)\]\S* (\w+)", "\n".join(computations))
    named = [(tuple(map(int, x.split(","))), name) for x, name in results if x]
    if shapes.isdisjoint(shape for shape, _ in named):
        return None
    total = sum(math.prod(x) for x, name in named if name == "copy" and x in shapes)
    return round(total / sum(x.size for x in jax.tree.leaves(params)), 2)


def take_turns(
    programs: Mapping[str, Program], repetitions: int
) -> dict[str, list[float]]:
    """Milliseconds a step of every program, in turn, after a call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    turns = tqdm(range(-1, repetitions), ", ".join(programs), leave=False, disable=None)
    for repetition in turns:
        for name, program in programs.items():
            start = time.perf_counter()
            program.run()
            took = (time.perf_counter() - start) * 1e3 / program.steps
            if repetition >= 0:
                times[name].append(took)
    return times


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes per second that this machine copies, read and written."""
    double = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size // 4)
    program = stateful(double.lower(x).compile(), x)
    times = take_turns({"copy": program}, 10)["copy"]
    return 2 * size / (float(np.median(times)) * 1e-3)


def measure(programs: Mapping[str, Program], repetitions: int) -> dict[str, Any]:
    """What is known of the programs, and their times."""
    return {
        "facts": {name: program.facts for name, program in programs.items()},
        "milliseconds": take_turns(programs, repetitions),
    }


def one_by_one(
    programs: Mapping[str, Callable[[], Program]], repetitions: int
) -> dict[str, Any]:
    """As :func:`measure`, for programs that do not fit, or belong, side by side."""
    measures: dict[str, Any] = {}
    for name, make in programs.items():
        for key, values in measure({name: make()}, repetitions).items():
            measures[key] = measures.get(key, {}) | values
    return measures


def medians(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Each method's median and quartiles, and its ratios to others.

    A ratio is the median of those within a turn (of the n-th timings, where methods
    were timed one by one): to the plain optimizer, or to what comes first, and to the
    wrapper where there is one.
    """
    first = next(iter(times))

    def compare(name: str, values: list[float]) -> dict[str, float]:
        to = {"plain": "torch adam" if name.startswith("torch") else first}
        if "wrapper" in times:
            to["wrapper"] = "wrapper"
        return {
            f"to_{key}": round(float(np.median(np.divide(values, times[other]))), 3)
            for key, other in to.items()
        }

    return {
        name: {
            "ms": round(float(np.median(values)), 4),
            "quartiles": np.percentile(values, [25, 75]),
            **compare(name, values),
        }
        for name, values in times.items()
    }
