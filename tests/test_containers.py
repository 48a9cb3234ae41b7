"""Synaptic Intelligence in the containers of optax, Flax, Equinox and of users."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, struct
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree
from problem import FORMS, OPTIMIZERS, grad, init, lenient, loss

import si_jax

TASKS, STEPS, CLOSE = 2, 4, {"rtol": 1e-4, "atol": 1e-7}
ADAM = OPTIMIZERS["adam"]

forms = pytest.mark.parametrize("form", FORMS)


def make(form, strength=0.5):
    return FORMS[form](ADAM, strength, 0.01)


def same(tree):
    return tree


def schedule():
    """(task, step, whether a later task begins) of two tasks and half a third."""
    for task in range(TASKS + 1):
        for step in range(STEPS if task < TASKS else STEPS // 2):
            yield task, task * STEPS + step, task > 0 and step == 0


def next_task(tx, opt_state, params):
    opt_state = si_jax.consolidate(opt_state, params)
    return si_jax.reset_optimizer(tx, opt_state, params)


def run(tx, pack=same, unpack=same):
    """Train with the parameters in the container that ``pack`` makes of a dict."""
    params = pack(init())
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for task, step, begins in schedule():
        if begins:
            opt_state = next_task(tx, opt_state, params)
        grads = pack(grad(unpack(params), task, step))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def run_apart(**txs):
    """Each entry of the parameters has an optimizer and a state to itself."""
    params = init()
    states = {name: tx.init(params[name]) for name, tx in txs.items()}
    updates = {name: jax.jit(tx.update) for name, tx in txs.items()}
    for task, step, begins in schedule():
        grads = grad(params, task, step)
        for name, tx in txs.items():
            mine = params[name]
            if begins and tx is ADAM:
                states[name] = tx.init(mine)
            elif begins:
                states[name] = next_task(tx, states[name], mine)
            change, states[name] = updates[name](grads[name], states[name], mine)
            params = params | {name: mine + change}
    return params, states


@functools.cache
def plain(form):
    """What every container must come to: θ, ω, Ω, θ̃ and the penalty."""
    params, opt_state = run(make(form))
    penalty = si_jax.surrogate_loss(opt_state, params)
    assert penalty > 1e-4
    free, _ = run(make(form, 0.0))
    assert jnp.abs(free["kernel"] - params["kernel"]).max() > 1e-3, "SI does nothing"
    return params, *si_jax.synapses(opt_state), penalty


def assert_as_plain(form, tx, params, opt_state, unpack=same):
    """The run is the plain one, and its state is reset by the tx that made it alone."""
    actual = map(unpack, (params, *si_jax.synapses(opt_state)))
    penalty = si_jax.surrogate_loss(opt_state, params)
    chex.assert_trees_all_close((*actual, penalty), plain(form), **CLOSE)

    fresh = si_jax.reset_optimizer(tx, opt_state, params)
    assert jax.tree.structure(fresh) == jax.tree.structure(opt_state)
    kept, memory = si_jax.synapses(fresh), si_jax.synapses(opt_state)
    assert all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(memory)))
    for name in ("count", "mu", "nu"):
        for state, used in ((opt_state, True), (fresh, False)):
            values = [x for _, x in optax.tree.get_all_with_path(state, name)]
            assert any(x.any() for x in jax.tree.leaves(values)) == used
    for other in (ADAM, FORMS[form](optax.sgd(0.1)), optax.chain(tx, tx)):
        with pytest.raises(ValueError, match="opt_state was not made by this tx"):
            si_jax.reset_optimizer(other, opt_state, params)


# --- Containers of optax --------------------------------------------------------------

OPTAX = {
    "chain": lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
    "named_chain": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda _: tx)(0.0),
}
ALL = functools.reduce(lambda f, g: lambda tx: g(f(tx)), OPTAX.values())


@pytest.mark.parametrize("container", [*OPTAX.values(), ALL], ids=[*OPTAX, "all"])
@forms
def test_containers_of_optax(form, container):
    tx = lenient(container(make(form)))
    assert_as_plain(form, tx, *run(tx))


@forms
def test_a_gradient_that_is_not_finite_leaves_no_trace(form):
    tx = optax.apply_if_finite(make(form), 3)
    params, opt_state = run(tx)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, after = jax.jit(tx.update)(nan, opt_state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(after.inner_state, opt_state.inner_state)


def split(params):
    upper, lower = jnp.split(params["kernel"], 2)
    return {"bias": params["bias"], "head": {"upper": upper, "lower": lower}}


def join(params):
    kernel = jnp.concatenate([params["head"]["upper"], params["head"]["lower"]])
    return {"bias": params["bias"], "kernel": kernel}


MASKS = {
    "tree": {"bias": True, "head": {"upper": False, "lower": False}},
    "prefix": {"bias": True, "head": False},
    "callable": lambda params: jax.tree.map(lambda x: x.ndim == 1, params),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@forms
def test_masked_leaves_train_as_without(form, mask):
    if form == "link":
        si = si_jax.synaptic_intelligence(0.5, 0.01)
        tx = optax.chain(optax.masked(si, mask), ADAM)
    else:

        def hidden(params):
            seen = mask(params) if callable(mask) else mask
            return jax.tree.map(lambda x: not x, seen)

        tx = optax.chain(optax.masked(make(form), mask), optax.masked(ADAM, hidden))
    params, opt_state = run(tx, split, join)
    expected, states = run_apart(bias=make(form), kernel=ADAM)
    chex.assert_trees_all_close(join(params), expected, **CLOSE)
    actual, memory = si_jax.synapses(opt_state), si_jax.synapses(states["bias"])
    for tree, leaf in zip(actual, memory, strict=True):
        np.testing.assert_allclose(tree["bias"], leaf, **CLOSE)
        assert not jax.tree.leaves(tree["head"])
    np.testing.assert_allclose(
        si_jax.surrogate_loss(opt_state, params),
        si_jax.surrogate_loss(states["bias"], expected["bias"]),
        **CLOSE,
    )


@pytest.mark.parametrize("second", [make, lambda *_: ADAM], ids=["two", "one"])
@forms
def test_partition_with_its_own_strength_for_each_group(form, second):
    txs = {"bias": make(form, 0.5), "kernel": second(form, 5.0)}
    tx = optax.partition(txs, {"bias": "bias", "kernel": "kernel"})
    params, opt_state = run(tx)
    expected, states = run_apart(**txs)
    chex.assert_trees_all_close(params, expected, **CLOSE)
    parts = {
        name: opt_state.inner_states[name] for name in txs if txs[name] is not ADAM
    }
    for name, part in parts.items():
        for tree, leaf in zip(
            si_jax.synapses(part), si_jax.synapses(states[name]), strict=True
        ):
            np.testing.assert_allclose(tree[name], leaf, **CLOSE)
    penalties = [si_jax.surrogate_loss(states[name], params[name]) for name in parts]
    assert min(penalties) > 1e-5
    np.testing.assert_allclose(
        si_jax.surrogate_loss(opt_state, params), sum(penalties), **CLOSE
    )
    if len(parts) == 2:
        with pytest.raises(ValueError, match="Synaptic Intelligence 2 times"):
            si_jax.synapses(opt_state)


@forms
def test_found_by_type_at_any_depth(form):
    params, opt_state = run(make(form))
    state = {"name": "run", "deep": [(None, {"opt": (opt_state, 3)}), "end"]}
    after = si_jax.consolidate(state, params)
    inside = after["deep"][0][1]["opt"][0]
    chex.assert_trees_all_equal(inside, si_jax.consolidate(opt_state, params))
    state["deep"][0][1]["opt"] = after["deep"][0][1]["opt"] = None
    assert after == state


# --- Containers of parameters ---------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataLayer:
    kernel: Any
    bias: Any


@struct.dataclass
class FlaxLayer:
    kernel: Any
    bias: Any


@chex.dataclass
class ChexLayer:
    kernel: Any
    bias: Any


@jax.tree_util.register_pytree_node_class
class Keyless(DataLayer):
    def tree_flatten(self):
        return (self.kernel, self.bias), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Module(eqx.Module):
    kernel: Any
    bias: Any
    activation: Any = jnp.tanh
    calls: Any = 0


def as_dict(tree):
    return {"kernel": tree.kernel, "bias": tree.bias}


PARAMS = {
    "FrozenDict": (FrozenDict, dict),
    "list": (
        lambda p: [p["kernel"], p["bias"]],
        lambda p: {"kernel": p[0], "bias": p[1]},
    ),
    "bare_array": (lambda p: ravel_pytree(p)[0], ravel_pytree(init())[1]),
    "empty_containers": (
        lambda p: {"a": {}, "b": [(), {"c": p, "d": []}], "e": FrozenDict()},
        lambda p: p["b"][1]["c"],
    ),
    "None_leaves": (
        lambda p: {**p, "a": None, "z": [None]},
        lambda p: {"kernel": p["kernel"], "bias": p["bias"]},
    ),
} | {
    layer.__name__: (lambda p, layer=layer: layer(**p), as_dict)
    for layer in (Layer, DataLayer, FlaxLayer, ChexLayer, Keyless)
}


@pytest.mark.parametrize("container", PARAMS)
@forms
def test_containers_of_parameters(form, container):
    pack, unpack = PARAMS[container]
    tx = make(form)
    params, opt_state = run(tx, pack, unpack)
    assert jax.tree.structure(params) == jax.tree.structure(pack(init()))
    assert_as_plain(form, tx, params, opt_state, unpack)


@forms
def test_equinox_modules(form):
    tx = make(form)
    params = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)

    @eqx.filter_jit
    def step(model, opt_state, *batch):
        grads = eqx.filter_grad(lambda model: loss(as_dict(model), *batch))(model)
        updates, opt_state = tx.update(grads, opt_state, params(model))
        return eqx.apply_updates(model, updates), opt_state

    model = Module(**init())
    opt_state = tx.init(params(model))
    for task, i, begins in schedule():
        if begins:
            opt_state = next_task(tx, opt_state, params(model))
        model, opt_state = step(model, opt_state, jnp.float32(task), jnp.int32(i))
    assert model.activation is jnp.tanh
    assert_as_plain(form, tx, params(model), opt_state, as_dict)
    whole, filtered = (si_jax.consolidate(opt_state, p) for p in (model, params(model)))
    chex.assert_trees_all_equal(whole, filtered)


@forms
def test_linen_train_state(form):
    tx, model = make(form), linen.Dense(3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    variables = jax.tree.map(lambda _, x: x, variables, {"params": init()})
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state, *batch):
        grads = jax.grad(lambda p: loss(p["params"], *batch))(state.params)
        return state.apply_gradients(grads=grads)

    for task, i, begins in schedule():
        if begins:
            state = state.replace(
                opt_state=next_task(tx, state.opt_state, state.params)
            )
        state = step(state, task, i)
    assert_as_plain(form, tx, state.params, state.opt_state, lambda p: p["params"])


class Model(nnx.Module):
    def __init__(self, params=None):
        params = params or init()
        self.kernel, self.bias = nnx.Param(params["kernel"]), nnx.Param(params["bias"])
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def loss(self, *batch):
        self.calls[...] += 1
        kernel, bias = self.kernel[...][:, :3], self.bias[...][:3]  # all, or it grew
        return loss({"kernel": kernel, "bias": bias}, *batch)


def put_back(optimizer, opt_state):
    """What the README and the guides say: in place."""
    nnx.update(optimizer.opt_state, nnx.state(opt_state))


def nnx_begin(tx, model, optimizer):
    params = nnx.state(model, nnx.Param)
    put_back(optimizer, si_jax.consolidate(optimizer.opt_state, params))
    put_back(optimizer, si_jax.reset_optimizer(tx, optimizer.opt_state, params))


def nnx_optimizer(model, tx):
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_update(optimizer, model, grads):
    if isinstance(optimizer, nnx.ModelAndOptimizer):
        optimizer.update(grads)
    else:
        optimizer.update(model, grads)


def compiled(model, optimizer, bind=functools.partial):
    """A step, and the list of its traces."""
    traces = []

    @nnx.jit
    def step(model, optimizer, task, i):
        traces.append(i)
        grads = nnx.grad(Model.loss)(model, task, i)
        nnx_update(optimizer, model, grads)

    return bind(step, model, optimizer), traces


def cached(model, optimizer):
    return compiled(model, optimizer, nnx.cached_partial)


def scanned(model, optimizer):
    """Two steps in a scan, when the second of them is due."""
    traces = []

    @nnx.jit
    def steps(model, optimizer, task, indices):
        traces.append(indices)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def body(carry, i):
            model, optimizer, task = carry
            grads = nnx.grad(Model.loss)(model, task, i)
            nnx_update(optimizer, model, grads)
            return carry

        body((model, optimizer, task), indices)

    def step(task, i):
        if i % 2:
            steps(model, optimizer, task, jnp.stack([i - 1, i]))

    return step, traces


def nnx_run(tx, bound=compiled, begin=nnx_begin, optimizer=nnx_optimizer):
    model = Model()
    optimizer = optimizer(model, tx)
    step, traces = bound(model, optimizer)
    for task, i, begins in schedule():
        if begins:
            begin(tx, model, optimizer)
        step(jnp.float32(task), jnp.int32(i))
    assert len(traces) == 1
    return nnx.state(model, nnx.Param), optimizer


@pytest.mark.parametrize("bound", [compiled, cached, scanned])
@pytest.mark.parametrize("optimizer", [nnx_optimizer, nnx.ModelAndOptimizer])
@forms
def test_nnx_optimizers(form, optimizer, bound):
    """A state that is put back in place is trained with, without a retrace."""
    tx = make(form)
    params, optimizer = nnx_run(tx, bound, optimizer=optimizer)
    assert_as_plain(form, tx, params, optimizer.opt_state, nnx.to_pure_dict)


@forms
def test_nnx_optimizer_between_tasks_in_a_compiled_function(form):
    tx = make(form)
    begin = nnx.jit(nnx_begin, static_argnums=0)
    params, optimizer = nnx_run(tx, cached, begin)
    assert_as_plain(form, tx, params, optimizer.opt_state, nnx.to_pure_dict)
    penalty = nnx.jit(lambda o, p: si_jax.surrogate_loss(o.opt_state, p))
    np.testing.assert_allclose(penalty(optimizer, params), plain(form)[-1], **CLOSE)


def pulled(tx, params, opt_state):
    """Where some steps lead from a state, in plain optax."""

    @jax.jit
    def step(params, opt_state, i):
        def first(params):
            kernel, bias = params["kernel"][:, :3], params["bias"][:3]
            return loss({"kernel": kernel, "bias": bias}, 1.0, i)

        updates, opt_state = tx.update(jax.grad(first)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(STEPS):
        params, opt_state = step(params, opt_state, i)
    return params


@forms
def test_importance_that_is_added_in_place_reaches_a_cached_step(form):
    tx, model = make(form, 5.0), Model()
    optimizer = nnx_optimizer(model, tx)
    step, _ = cached(model, optimizer)
    step(jnp.float32(0), jnp.int32(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    updates, opt_state = tx.update(grad(init(), 0, 0), tx.init(init()), init())
    chex.assert_trees_all_close(params, optax.apply_updates(init(), updates))
    free = pulled(tx, params, opt_state)

    ones = optax.tree.ones_like(nnx.state(model, nnx.Param))
    put_back(optimizer, si_jax.add_importance(optimizer.opt_state, ones))
    for i in range(STEPS):
        step(jnp.float32(1), jnp.int32(i))
    held = pulled(tx, params, si_jax.add_importance(opt_state, nnx.to_pure_dict(ones)))
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(actual, held, **CLOSE)
    assert jnp.abs(free["kernel"] - held["kernel"]).max() > 1e-2


@forms
def test_memory_of_a_model_that_grew_reaches_its_own_cached_step(form):
    """Other shapes cannot be put back in place: the optimizer and the step are new."""
    tx = make(form, 5.0)
    _, old = nnx_run(tx, cached)
    params, opt_state = run(tx)
    grown = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1), params
    )
    model = Model(grown)
    optimizer = nnx_optimizer(model, tx)
    put_back(optimizer, si_jax.carry_over(old.opt_state, into=optimizer.opt_state))
    step, _ = cached(model, optimizer)
    for i in range(STEPS):
        step(jnp.float32(1), jnp.int32(i))
    carried = si_jax.carry_over(opt_state, into=tx.init(grown))
    held, free = (pulled(tx, grown, state) for state in (carried, tx.init(grown)))
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(actual, held, **CLOSE)
    assert jnp.abs(free["kernel"] - held["kernel"]).max() > 1e-3


@forms
def test_nnx_optimizer_with_a_mask(form):
    seen = functools.partial(jax.tree.map, lambda x: x.ndim == 1)
    hidden = functools.partial(jax.tree.map, lambda x: x.ndim != 1)
    tx = optax.chain(optax.masked(make(form), seen), optax.masked(ADAM, hidden))
    params, optimizer = nnx_run(tx)
    expected, states = run_apart(bias=make(form), kernel=ADAM)
    chex.assert_trees_all_close(nnx.to_pure_dict(params), expected, **CLOSE)
    np.testing.assert_allclose(
        si_jax.surrogate_loss(optimizer.opt_state, params),
        si_jax.surrogate_loss(states["bias"], expected["bias"]),
        **CLOSE,
    )
