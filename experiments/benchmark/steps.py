"""What is timed: training steps and updates, by network and method."""

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import si_jax
from experiments.benchmark.config import Config
from experiments.engine.timing import (
    Program,
    compiles_with,
    copies,
    copy_bandwidth,
    measure,
    one_by_one,
    stateful,
)
from experiments.networks.models import CNN, MLP
from experiments.training.boundaries import kronecker_factors
from experiments.training.loop import sum_over_parts
from si_jax import ewc, importance, kronecker


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
    "narrow MNIST": Net(MLP((100, 100), 10), (28, 28, 1), 256, 100),
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


PASS = 1000  # examples of a pass for the Fisher information, whole or in factors


REGION_ANALYSIS = {"xla_cpu_copy_insertion_use_region_analysis": True}


class Method(NamedTuple):
    """An optimizer.

    Attributes:
      tx: the optimizer.
      moved: bytes a float32 parameter that its update must read and write, besides
        Kronecker factors.
      close: ``(state, parameters) → state`` at a task's end.
      options: of XLA, to compile its programs with.
    """

    tx: optax.GradientTransformationExtraArgs
    moved: int
    close: Callable[[optax.OptState, optax.Params], optax.OptState]
    options: Mapping[str, Any] = {}

    def start(self, params: optax.Params) -> optax.OptState:
        """Its state in a second task; SI's Ω is zero there, but multiplied as ever."""
        return self.close(self.tx.init(params), params)


def methods(net: Net | None = None) -> dict[str, Method]:
    """Adam alone, under either form of Synaptic Intelligence, and behind EWC.

    With a network behind Kronecker factors, too, which depend on its layers.
    """
    adam = optax.adam(1e-3)

    def wrapper(moved: int, state_dtype: str | None = None) -> Method:
        tx = si_jax.with_synaptic_intelligence(adam, 0.1, 0.1, state_dtype=state_dtype)
        return Method(tx, moved, si_jax.consolidate)

    def elastic(moved: int, state_dtype: str | None = None) -> Method:
        memory = ewc.elastic_weight_consolidation(0.1, state_dtype=state_dtype)
        return Method(optax.chain(memory, adam), moved, with_ones)

    def with_ones(opt_state: optax.OptState, params: optax.Params) -> optax.OptState:
        return ewc.consolidate(opt_state, params, jax.tree.map(jnp.ones_like, params))

    def factored(net: Net) -> Method:
        # Of convolutions as such: as products, the kernels are transformed first.
        model = PLAIN if isinstance(net.model, CNN) else net.model
        shapes = kronecker_factors(model, net.image_shape)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        memory = kronecker.kronecker_consolidation(0.1, shapes)

        def close(opt_state: optax.OptState, params: optax.Params) -> optax.OptState:
            return kronecker.consolidate(opt_state, params, ones)

        return Method(optax.chain(memory, adam), 32, close)

    first = si_jax.synaptic_intelligence(0.1, 0.1)
    link = Method(optax.chain(first, adam), 60, si_jax.consolidate)
    by_name = {
        "adam": Method(adam, 28, lambda opt_state, _: opt_state),
        "wrapper": wrapper(44),
        "wrapper, bfloat16 Ω and θ̃": wrapper(40, "bfloat16"),
        "link": link,
        "wrapper, compact": wrapper(35, "compact"),
        "ewc": elastic(36),
        "ewc, bfloat16": elastic(32, "bfloat16"),
    }
    if net is not None:
        by_name["kronecker"] = factored(net)
    if jax.default_backend() == "cpu" and compiles_with(REGION_ANALYSIS):
        by_name["link, region analysis"] = link._replace(options=REGION_ANALYSIS)
    return by_name


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


def time_net(name: str, config: Config) -> dict[str, Any]:
    """A network's training steps."""
    net = NETS[name]
    programs = {k: training(net, method) for k, method in methods(net).items()}
    programs |= torch_training(net)
    measures = measure(programs, config.repetitions)
    return measures | {"batch_size": net.batch_size}


def time_calls(name: str, config: Config) -> dict[str, Any]:
    """The same steps, each a call that gives its state back."""
    net = NETS[name]._replace(loop=False)
    programs = {k: training(net, method) for k, method in methods(net).items()}
    measures = measure(programs, config.repetitions)
    return measures | {"batch_size": net.batch_size}


def time_convolutions(config: Config) -> dict[str, Any]:
    """A step of the convolutional network with Adam, by how it is computed."""
    adam = methods()["adam"]
    makers = {
        name: functools.partial(training, net, adam)
        for name, net in CONVOLUTIONS.items()
    }
    measures = one_by_one(makers, min(config.repetitions, 3))  # one takes half a minute
    return measures | {"batch_size": NETS["split CIFAR"].batch_size}


def time_boundary(name: str, config: Config) -> dict[str, Any]:
    """EWC's importance at a task's end, of a network.

    In a pass over examples, the Fisher information, diagonal and in Kronecker factors;
    and from what Adam has kept.
    """
    net = NETS[name]
    adam, images = optax.adam(1e-3), jnp.ones((PASS, *net.image_shape))
    params = net.model.init(jax.random.key(0), images[:1])
    _, opt_state = adam.update(params, adam.init(params), params)

    def logits(params, image):
        return net.model.apply(params, image[None])[0]

    def measured(params, images, key):
        return importance.fisher(logits, params, images, key)

    def factors(params, images, key):
        return importance.kronecker(logits, params, images, key)

    def kept(opt_state):
        return importance.second_moment(opt_state, b2=0.999, batch_size=net.batch_size)

    def program(function: Callable[..., Any], *arguments: Any) -> Program:
        compiled = jax.jit(function).lower(*arguments).compile()
        return Program(lambda: jax.block_until_ready(compiled(*arguments)), 1, {})

    key = jax.random.key(0)
    programs = {
        f"Fisher, {PASS} examples": program(measured, params, images, key),
        "second moment": program(kept, opt_state),
        f"Kronecker, {PASS} examples": program(factors, params, images, key),
    }
    return measure(programs, min(config.repetitions, 3))  # one takes seconds


def time_update(name: str, config: Config) -> dict[str, Any]:
    """Updates of a network, or of the large tree, and bytes moved."""
    net = NETS.get(name)
    params = (
        large_tree(config.large)
        if net is None
        else net.model.init(jax.random.key(0), jnp.zeros((1, *net.image_shape)))
    )
    makers = {
        method: functools.partial(updating, params, of)
        for method, of in methods(net).items()
    }
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "copy": copy_bandwidth(),
        **(
            one_by_one(makers, config.repetitions)
            if net is None
            else measure({k: make() for k, make in makers.items()}, config.repetitions)
        ),
    }
