"""What Synaptic Intelligence costs: ``python -m experiments.benchmark``."""

import dataclasses
import functools
import importlib.util
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import si_jax
from experiments import figures
from experiments.engine import command
from experiments.engine.record import Record, is_first
from experiments.engine.tables import aligned
from experiments.networks.models import CNN, MLP
from experiments.training.loop import sum_over_parts


class Net(NamedTuple):
    """A network of the paper's and how a step of it is taken.

    Attributes:
      model: in Flax.
      image_shape: height, width, channels.
      batch_size: examples a step.
      steps: of one timing.
      micro_batch: parts of a batch to take one by one; 0 for none.
      loop: whether the steps are in a compiled loop; without one each is a call.
    """

    model: MLP | CNN
    image_shape: tuple[int, int, int]
    batch_size: int
    steps: int
    micro_batch: int = 0
    loop: bool = True


NETS = {
    "split MNIST": Net(MLP((256, 256), 10), (28, 28, 1), 64, 500),
    "permuted MNIST": Net(MLP((2000, 2000), 10), (28, 28, 1), 256, 10),
    "split CIFAR": Net(CNN(60), (32, 32, 3), 256, 2, micro_batch=32),
}
PLAIN = CNN(60, convolve=jax.lax.conv_general_dilated)
CONVOLUTIONS = {  # what makes the CNN's step fast on a CPU
    "plain": Net(PLAIN, (32, 32, 3), 256, 1, loop=False),
    "plain, in a loop": Net(PLAIN, (32, 32, 3), 256, 1),
    "as products": Net(CNN(60), (32, 32, 3), 256, 2),
    "as products, parts of 32": NETS["split CIFAR"],
}
LARGE = "large tree"
MATRIX = 1024, 4096
CALLS = "step by step"
REGION_ANALYSIS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclasses.dataclass(frozen=True)
class Config(command.Options):
    """Time of a training step, and of an update alone, by method.

    The methods take turns, so that whatever else the machine does meets them alike (but
    for the large tree, whose states do not fit side by side); compilation is left out.
    Compare within a run: seconds of two machines say little.
    The methods in PyTorch are left out where it is not installed.
    """

    nets: tuple[Literal["split MNIST", "permuted MNIST", "split CIFAR"], ...] = (
        "split MNIST",
        "permuted MNIST",
        "split CIFAR",
    )
    """The paper's networks, with their batch sizes."""
    convolutions: bool = True
    """Time what makes the convolutional network fast, too."""
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
    """An optimizer.

    Attributes:
      tx: the optimizer.
      moved: bytes a float32 parameter that its update must read and write.
      synaptic: whether it is one with Synaptic Intelligence.
      options: of XLA, to compile its programs with.
    """

    tx: optax.GradientTransformationExtraArgs
    moved: int
    synaptic: bool = True
    options: Mapping[str, Any] = {}

    def start(self, params: optax.Params) -> optax.OptState:
        """Its state in a second task; Ω is zero there, but multiplied all the same."""
        opt_state = self.tx.init(params)
        return si_jax.consolidate(opt_state, params) if self.synaptic else opt_state


def methods() -> dict[str, Method]:
    """Adam alone, and under either form of Synaptic Intelligence."""
    adam = optax.adam(1e-3)
    wrap = functools.partial(si_jax.with_synaptic_intelligence, adam, 0.1, 0.1)
    link = Method(optax.chain(si_jax.synaptic_intelligence(0.1, 0.1), adam), 60)
    found = {
        "adam": Method(adam, 28, synaptic=False),
        "wrapper": Method(wrap(), 44),
        "wrapper, bfloat16 Ω and θ̃": Method(wrap(state_dtype="bfloat16"), 40),
        "link": link,
    }
    if jax.default_backend() == "cpu" and compiles_with(REGION_ANALYSIS):
        found["link, region analysis"] = link._replace(options=REGION_ANALYSIS)
    return found


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


def stepping(
    function: Any,
    params: optax.Params,
    method: Method,
    *shared: Any,
    steps: int = 1,
    loop: bool = False,
) -> Program:
    """A program on parameters and the optimizer's state, and the facts of it."""
    state = params, method.start(params)
    start = time.perf_counter()
    lowered = function.lower(state, *shared)
    compiled = lowered.compile(compiler_options=dict(method.options))
    facts: dict[str, float] = {
        "compile_s": round(time.perf_counter() - start, 3),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state[1])),
    }
    text = compiled.as_text() or ""
    if (copied := copies(text, params, in_loop=loop)) is not None:
        facts["copies"] = copied
    cost = compiled.cost_analysis()
    if cost and "bytes accessed" in cost:  # not every backend says
        count = sum(x.size for x in jax.tree.leaves(params))
        facts["accessed"] = round(cost["bytes accessed"] / count, 1)
    calls = 1 if loop else steps
    program = stateful(compiled, state, *shared, steps=steps, calls=calls)
    return program._replace(facts={**facts, **program.facts})


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


def training(net: Net, method: Method) -> Program:
    """Steps on random images, gathered from the device, in one compiled loop."""
    size = net.batch_size
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 255, (10_000, *net.image_shape), np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, 10_000, np.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, images, labels):
        def part(params, rows, key):
            def loss(params):
                x = images[rows].astype(jnp.float32) / 255
                logits = net.model.apply(params, x, rngs={"dropout": key})
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, labels[rows]
                ).sum()

            return jax.grad(loss)(params)

        def step(i, state):
            params, opt_state = state
            rows = (i * size + jnp.arange(size)) % len(labels)
            key = jax.random.fold_in(jax.random.key(0), i)
            gradient = functools.partial(part, params)
            grads = (
                sum_over_parts(gradient, rows, key, net.micro_batch)
                if net.micro_batch
                else gradient(rows, key)
            )
            grads = jax.tree.map(lambda g: g / size, grads)
            updates, opt_state = method.tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        if not net.loop:
            return step(0, state)
        return jax.lax.fori_loop(0, net.steps, step, state)

    params = net.model.init(jax.random.key(0), jnp.zeros((1, *net.image_shape)))
    return stepping(
        train, params, method, images, labels, steps=net.steps, loop=net.loop
    )


def updating(params: optax.Params, method: Method) -> Program:
    """One update, the gradient being there."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, grads):
        params, opt_state = state
        updates, opt_state = method.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(lambda p: 0.01 * p, params)
    params = jax.tree.map(jnp.array, params)
    return stepping(update, params, method, grads)


def torch_training(net: Net) -> dict[str, Program]:
    """The same steps in PyTorch, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    from experiments.networks import torch_si

    torch.manual_seed(0)
    images = torch.rand(net.batch_size, *np.roll(net.image_shape, 1))
    labels = torch.randint(0, 10, (net.batch_size,))

    def program(step):
        def run():
            for _ in range(net.steps):
                step(images, labels)

        return Program(run, net.steps, {})

    return {
        name: program(make(torch_si.network(net.model)))
        for name, make in torch_si.METHODS.items()
    }


def large_tree(size: int) -> optax.Params:
    """About ``size`` parameters in matrices like a transformer's."""
    count = max(size // math.prod(MATRIX), 1)
    return {str(i): jnp.full(MATRIX, 0.1) for i in range(count)}


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
    todo["update"] = functools.partial(time_update, large=False)
    if config.large:
        todo[LARGE] = functools.partial(time_update, large=True)
    for name, timing in todo.items():
        if name not in record.runs:
            record.add(name, timing(config), summarize)
    if is_first():
        summary = record.content["summary"]
        print(table(summary))
        record.save("benchmark", figure(summary))


def measure(programs: Mapping[str, Program], repetitions: int) -> dict[str, Any]:
    """What is known of the programs, and their times."""
    return {
        "facts": {name: program.facts for name, program in programs.items()},
        "milliseconds": take_turns(programs, repetitions),
    }


def time_net(name: str, config: Config) -> dict[str, Any]:
    """A network's training steps."""
    net = NETS[name]
    programs = {k: training(net, method) for k, method in methods().items()}
    programs |= torch_training(net)
    found = measure(programs, config.repetitions)
    return found | {"batch_size": net.batch_size}


def time_calls(name: str, config: Config) -> dict[str, Any]:
    """The same steps, each a call that gives its state back."""
    net = NETS[name]._replace(loop=False)
    programs = {k: training(net, method) for k, method in methods().items()}
    found = measure(programs, config.repetitions)
    return found | {"batch_size": net.batch_size}


def one_by_one(
    programs: Mapping[str, Callable[[], Program]], repetitions: int
) -> dict[str, Any]:
    """As :func:`measure`, for programs that do not fit, or belong, side by side."""
    found: dict[str, Any] = {}
    for name, make in programs.items():
        for key, values in measure({name: make()}, repetitions).items():
            found[key] = found.get(key, {}) | values
    return found


def time_convolutions(config: Config) -> dict[str, Any]:
    """A step of the convolutional network with Adam, by how it is computed."""
    adam = methods()["adam"]
    makers = {
        name: functools.partial(training, net, adam)
        for name, net in CONVOLUTIONS.items()
    }
    found = one_by_one(makers, min(config.repetitions, 3))  # one takes half a minute
    return found | {"batch_size": NETS["split CIFAR"].batch_size}


def time_update(config: Config, *, large: bool) -> dict[str, Any]:
    """Updates of the permuted-MNIST net, or of the large tree, and bytes moved."""
    net = NETS["permuted MNIST"]
    params = (
        large_tree(config.large)
        if large
        else net.model.init(jax.random.key(0), jnp.zeros((1, *net.image_shape)))
    )
    makers = {
        name: functools.partial(updating, params, method)
        for name, method in methods().items()
    }
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "copy": copy_bandwidth(),
        **(
            one_by_one(makers, config.repetitions)
            if large
            else measure({k: make() for k, make in makers.items()}, config.repetitions)
        ),
    }


def summarize(found: Mapping[str, Any]) -> dict[str, Any]:
    """Each method's times and facts, and what follows from them."""
    summary = medians(found["milliseconds"])
    for name, entry in summary.items():
        entry |= found["facts"][name]
        if "batch_size" in found:
            entry["examples_per_s"] = round(found["batch_size"] / entry["ms"] * 1e3, 1)
        if "copy" in found:
            moved = methods()[name].moved * found["parameters"]
            entry["of_copy_bandwidth"] = round(
                moved / (entry["ms"] * 1e-3) / found["copy"], 3
            )
    return summary


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


def table(summary: Mapping[str, Any]) -> str:
    """A row a method of what was timed.

    "B/param" are bytes accessed, "copies" those of all parameters in a step, both as
    compiled; "of copy" is the bandwidth by the bytes that must move, over
    that of a copy.
    """
    kinds = {
        "ms": ("ms", 1, ".3f"),
        "× plain": ("to_plain", 1, ".2f"),
        "× wrapper": ("to_wrapper", 1, ".2f"),
        "B/param": ("accessed", 1, ".0f"),
        "copies": ("copies", 1, ".0f"),
        "images/s": ("examples_per_s", 1, ".0f"),
        "of copy": ("of_copy_bandwidth", 1, ".2f"),
        "compile s": ("compile_s", 1, ".1f"),
        "peak MB": ("peak_bytes", 1e-6, ".0f"),
        "state MB": ("state_bytes", 1e-6, ".1f"),
    }
    rows = [["", *kinds]]
    for what, found in summary.items():
        for name, x in found.items():
            cells = [
                f"{x[key] * unit:{form}}" if key in x else ""
                for key, unit, form in kinds.values()
            ]
            rows.append([f"{what}, {name}", *cells])
    return aligned(rows)


def figure(summary: Mapping[str, Any]) -> Figure:
    """Each method's time by that of the wrapper."""
    return figures.ratios(
        {
            what: {name: x["to_wrapper"] for name, x in found.items()}
            for what, found in summary.items()
            if "adam" in found
        },
        label="time by that of Adam with the wrapper",
    )


if __name__ == "__main__":
    command.main(Config, "benchmark", run)
