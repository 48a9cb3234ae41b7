"""What Synaptic Intelligence costs: ``python -m experiments.benchmark``."""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import si_jax
from experiments import command
from experiments.record import Record, aligned, is_first
from si_jax.models import MLP


class Net(NamedTuple):
    """A network of the paper's, its batch size, and the steps of one timing."""

    hidden: tuple[int, ...]
    batch_size: int
    steps: int


NETS = {
    "split MNIST": Net((256, 256), 64, 500),
    "permuted MNIST": Net((2000, 2000), 256, 10),
}
LARGE = "large tree"


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Time of a training step, and of an update alone, by method.

    The methods take turns, so that whatever else the machine does meets them alike (but
    for the large tree, whose states do not fit side by side); compilation is left out.
    Compare within a run: seconds of two machines say little.
    The methods in PyTorch are left out where it is not installed.
    """

    nets: tuple[Literal["split MNIST", "permuted MNIST"], ...] = (
        "split MNIST",
        "permuted MNIST",
    )
    """The paper's networks, with their batch sizes."""
    repetitions: int = 9
    """Timings of each method."""
    large: int = 100_000_000
    """Parameters of a tree like a transformer's, to time the update on; 0: none."""

    def __post_init__(self):
        """Refuse values that make no sense."""
        self.check(positive=(), at_least_1=("repetitions",))
        if self.large < 0:
            raise ValueError(f"large must be >= 0, got {self.large}")


class Method(NamedTuple):
    """An optimizer, and whether it is one with Synaptic Intelligence."""

    tx: optax.GradientTransformationExtraArgs
    synaptic: bool = True

    def start(self, params: optax.Params) -> optax.OptState:
        """Its state in a second task; Ω is zero there, but multiplied all the same."""
        opt_state = self.tx.init(params)
        return si_jax.consolidate(opt_state, params) if self.synaptic else opt_state


def methods() -> dict[str, Method]:
    """Adam alone, and under either form of Synaptic Intelligence."""
    adam = optax.adam(1e-3)
    return {
        "adam": Method(adam, synaptic=False),
        "wrapper": Method(si_jax.with_synaptic_intelligence(adam, 0.1, 0.1)),
        "link": Method(optax.chain(si_jax.synaptic_intelligence(0.1, 0.1), adam)),
    }


Program = Callable[[], Any]


def stateful(function: Any, state: Any, *shared: Any) -> Program:
    """A program that hands its result, the state, to its next call."""

    def program():
        nonlocal state
        state = jax.block_until_ready(function(state, *shared))

    return program


def training(net: Net, method: Method) -> Program:
    """Steps on random digits, gathered from the device, in one compiled loop."""
    model, size = MLP(net.hidden, 10), net.batch_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 255, (10_000, 28, 28, 1), np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 10_000, np.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, images, labels):
        def loss(params, rows):
            logits = model.apply(params, images[rows].astype(jnp.float32) / 255)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels[rows]
            ).mean()

        def step(i, state):
            params, opt_state = state
            rows = (i * size + jnp.arange(size)) % len(labels)
            grads = jax.grad(loss)(params, rows)
            updates, opt_state = method.tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.lax.fori_loop(0, net.steps, step, state)

    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return stateful(train, (params, method.start(params)), images, labels)


def updating(params: optax.Params, method: Method) -> Program:
    """One update, the gradient being there."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, grads):
        params, opt_state = state
        updates, opt_state = method.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(lambda p: 0.01 * p, params)
    params = jax.tree.map(jnp.array, params)
    return stateful(update, (params, method.start(params)), grads)


def torch_training(net: Net) -> dict[str, Program]:
    """The same steps in PyTorch, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    from experiments import benchmark_torch

    images = torch.rand(net.batch_size, 784)
    labels = torch.randint(10, (net.batch_size,))

    def program(step):
        def run():
            for _ in range(net.steps):
                step(images, labels)

        return run

    return {
        name: program(make(benchmark_torch.mlp(net.hidden)))
        for name, make in benchmark_torch.METHODS.items()
    }


def large_tree(size: int) -> optax.Params:
    """About ``size`` parameters in matrices of 1024 × 4096."""
    count = max(size // (1024 * 4096), 1)
    return {str(i): jnp.full((1024, 4096), 0.1) for i in range(count)}


def take_turns(
    programs: Mapping[str, Program], repetitions: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds a step of every program, in turn, after a call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(-1, repetitions):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            took = (time.perf_counter() - start) * 1e3 / steps
            if repetition >= 0:
                times[name].append(took)
    return times


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes per second that this machine copies, read and written."""
    double = jax.jit(lambda x: x + 1, donate_argnums=0)
    program = stateful(double, jnp.zeros(size // 4))
    times = take_turns({"copy": program}, 10, steps=1)["copy"]
    return 2 * size / (float(np.median(times)) * 1e-3)


def run(config: Config) -> None:
    """Time what is not timed yet; print a table."""
    record = Record("benchmark", config)
    todo: dict[str, Callable[[Config], dict[str, Any]]] = {
        name: functools.partial(time_net, name) for name in config.nets
    }
    todo["update"] = functools.partial(time_update, large=False)
    if config.large:
        todo[LARGE] = functools.partial(time_update, large=True)
    for name, measure in todo.items():
        if name not in record.runs:
            found = measure(config)
            record.add(name, found, summary=medians(found["milliseconds"]))
    if is_first():
        print(table(record.content["summary"]))


def time_net(name: str, config: Config) -> dict[str, Any]:
    """A network's training steps."""
    net = NETS[name]
    programs = {k: training(net, method) for k, method in methods().items()}
    programs |= torch_training(net)
    return {"milliseconds": take_turns(programs, config.repetitions, net.steps)}


def time_update(config: Config, *, large: bool) -> dict[str, Any]:
    """Updates of the permuted-MNIST net, or of the large tree, and bytes moved."""
    hidden = NETS["permuted MNIST"].hidden
    params = (
        large_tree(config.large)
        if large
        else MLP(hidden, 10).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    found: dict[str, Any] = {"parameters": count, "copy": copy_bandwidth()}
    times: dict[str, list[float]] = {}
    if large:  # one after the other, as their states do not fit side by side
        for name, method in methods().items():
            programs = {name: updating(params, method)}
            times |= take_turns(programs, config.repetitions, steps=1)
            del programs  # before the next one's state is made
    else:
        programs = {name: updating(params, m) for name, m in methods().items()}
        times = take_turns(programs, config.repetitions, steps=1)
    return found | {"milliseconds": times}


def medians(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Each method's median and quartiles, and its ratios to others.

    A ratio is the median of those within a turn: to the plain optimizer, and to the
    wrapper.
    """

    def ratio(values: list[float], to: str) -> float:
        return round(float(np.median(np.divide(values, times[to]))), 3)

    return {
        name: {
            "ms": round(float(np.median(values)), 4),
            "quartiles": np.percentile(values, [25, 75]),
            "to_adam": ratio(
                values, "torch adam" if name.startswith("torch") else "adam"
            ),
            "to_wrapper": ratio(values, "wrapper"),
        }
        for name, values in times.items()
    }


def table(summary: Mapping[str, Any]) -> str:
    """A row a method of what was timed."""
    rows = [["", "ms", "× plain Adam", "× wrapper"]]
    for what, found in summary.items():
        for name, x in found.items():
            numbers = [
                f"{x['ms']:.3f}",
                f"{x['to_adam']:.2f}",
                f"{x['to_wrapper']:.2f}",
            ]
            rows.append([f"{what}, {name}", *numbers])
    return aligned(rows)


if __name__ == "__main__":
    command.main(Config, "benchmark", run)
