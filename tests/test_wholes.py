"""What callers pass as a whole: modules, training states, optax's own trees, hosts."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from problem import FORMS, OPTIMIZERS, grad, init, lenient

import si_jax
from si_jax import ewc

ADAM, SGD = OPTIMIZERS["adam"], optax.sgd(0.1)
forms = pytest.mark.parametrize("form", FORMS)


def make(form, inner=ADAM, **kwargs):
    return FORMS[form](inner, 0.5, 0.01, **kwargs)


# --- Modules and training states ------------------------------------------------------


class Network(eqx.Module):
    """With all that a module holds beside its parameters."""

    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout  # a rate, a bool
    activation: object
    steps: jax.Array
    key: jax.Array
    nothing: None = None

    def __call__(self, x):
        return self.activation(self.linear(x)).sum()


@forms
def test_an_equinox_module_as_a_whole(form):
    """As if it had been filtered, in every call that takes parameters."""
    tx = make(form)
    model = Network(
        eqx.nn.Linear(3, 2, key=jax.random.key(0)),
        eqx.nn.Dropout(0.5),
        jnp.tanh,
        jnp.array(3),
        jax.random.key(1),
    )

    def filtered(model):
        return eqx.filter(model, eqx.is_inexact_array)

    def run(select):
        now, found = model, []
        opt_state = tx.init(filtered(model))
        opt_state = si_jax.add_importance(
            opt_state, jax.tree.map(lambda x: jnp.ones_like(x), filtered(now))
        )
        for _ in range(2):
            grads = eqx.filter_grad(lambda m: m(jnp.ones(3)))(now)
            updates, opt_state = tx.update(grads, opt_state, select(now))
            now = eqx.apply_updates(now, updates)
            found.append(si_jax.surrogate_loss(opt_state, select(now)))
            found.append(tuple(si_jax.diagnose(opt_state, select(now))))
            opt_state = si_jax.consolidate(opt_state, select(now))
        return found, opt_state

    chex.assert_trees_all_equal(run(lambda m: m), run(filtered), strict=True)
    opt_state = tx.init(filtered(model))
    unknown = eqx.tree_at(
        lambda m: m.nothing, model, jnp.ones(2), is_leaf=lambda x: x is None
    )
    with pytest.raises(ValueError, match=r"params\.nothing is unknown"):
        si_jax.consolidate(opt_state, unknown)


@forms
def test_a_train_state_as_a_whole(form):
    """What holds the optimizer's state is returned with it consolidated."""
    state = TrainState.create(apply_fn=None, params=init(), tx=make(form))
    state = state.apply_gradients(grads=grad(state.params, 0, 0))
    after = si_jax.consolidate(state, state.params)
    expected = si_jax.consolidate(state.opt_state, state.params)
    chex.assert_trees_all_equal(after, state.replace(opt_state=expected), strict=True)
    far = jax.tree.map(lambda x: x + 1, state.params)
    assert si_jax.surrogate_loss(after, far) == si_jax.surrogate_loss(expected, far)
    elastic = optax.chain(ewc.elastic_weight_consolidation(1.0), ADAM)
    state = TrainState.create(apply_fn=None, params=init(), tx=lenient(elastic))
    after = ewc.consolidate(state, state.params, jax.tree.map(jnp.square, init()))
    assert isinstance(after, TrainState)


@forms
def test_what_nnx_split_gives_names_merge(form):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(form), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    definition, state = nnx.split(optimizer)
    for wrong in (state, state["opt_state"]):
        with pytest.raises(ValueError, match=r"nnx\.split took apart, nnx\.merge puts"):
            si_jax.consolidate(wrong, params)
    merged = nnx.merge(definition, state)
    si_jax.consolidate(merged.opt_state, params)


# --- Trees that optax makes -----------------------------------------------------------


@forms
def test_flatten_belongs_inside(form):
    params = init()
    outside, inside = optax.flatten(make(form, SGD)), make(form, optax.flatten(SGD))
    opt_state = outside.init(params)
    _, opt_state = outside.update(params, opt_state, params)
    for call in (si_jax.consolidate, si_jax.surrogate_loss, si_jax.diagnose):
        with pytest.raises(ValueError, match=r"optax\.flatten belongs inside"):
            call(opt_state, params)
    ends = []
    for tx in (inside, make(form, SGD)):
        opt_state = tx.init(params)
        updates, opt_state = tx.update(params, opt_state, params)
        moved = optax.apply_updates(params, updates)
        ends.append(si_jax.synapses(si_jax.consolidate(opt_state, moved)))
    chex.assert_trees_all_close(*ends, rtol=1e-6)


def test_lookahead_belongs_around_the_link():
    params = optax.LookaheadParams.init_synced(jnp.array([1.0, -2.0]))
    for form in FORMS:
        tx = make(form, optax.lookahead(SGD, 2, 0.5))
        opt_state = tx.init(params)
        with pytest.raises(
            ValueError, match=r"lookahead\(optax\.chain\(.*params\.fast"
        ):
            tx.update(params.fast, opt_state, params)

    tx = lenient(optax.lookahead(make("link", SGD), 2, 0.5))
    opt_state, omega = tx.init(params), 0.0
    start = np.float64(params.fast)
    for _ in range(4):
        grads = params.fast
        updates, opt_state = tx.update(grads, opt_state, params)
        before, params = params, optax.apply_updates(params, updates)
        moved = np.float64(params.fast) - np.float64(before.fast)
        omega = omega - np.float64(grads) * moved  # back to the slow ones, too
    with pytest.raises(ValueError, match=r"pass params\.fast"):
        si_jax.consolidate(opt_state, params)
    held = si_jax.synapses(si_jax.consolidate(opt_state, params.fast))
    far = np.float64(params.fast) - start
    expected = np.maximum(omega / (far**2 + 0.01), 0)
    np.testing.assert_allclose(held.importance, expected, rtol=1e-5)


# --- Behind the wrapper's back --------------------------------------------------------

MASK = {"kernel": True, "bias": False}  # frozen


def frozen(form, where):
    freeze = optax.freeze(MASK)
    if where == "behind":
        return lenient(optax.chain(make(form, SGD), freeze))
    return make(form, lenient(optax.chain(SGD, freeze)))


@pytest.mark.parametrize(
    ("form", "where", "earns"),
    [
        ("link", "behind", False),
        ("link", "inside", False),
        ("wrapper", "inside", False),
        ("wrapper", "behind", True),  # which is the mistake
    ],
)
def test_what_is_frozen_earns_nothing_but_behind_the_wrapper(form, where, earns):
    tx, params = frozen(form, where), init()
    opt_state = tx.init(params)
    for step in range(3):
        updates, opt_state = tx.update(grad(params, 0, step), opt_state, params)
        params = optax.apply_updates(params, updates)
    remark = "Earned ω, but did not move: kernel."
    assert (remark in str(si_jax.diagnose(opt_state, params))) == earns
    held = si_jax.synapses(si_jax.consolidate(opt_state, params)).importance
    assert bool(held["kernel"].any()) == earns
    assert held["bias"].all()


# --- Memory of the host ---------------------------------------------------------------


def moved(tree, kind):
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)
    return jax.device_put(tree, places)


@forms
def test_a_state_that_rests_in_host_memory(form):
    """The guide's recipe, for a state that is sharded over devices."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip("no pinned_host memory")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    params = {"w": jnp.arange(1.0, 5.0)}
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec))
    tx = make(form, SGD)
    opt_state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, opt_state = jax.jit(tx.update)(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    resting = moved(opt_state, "pinned_host")
    after = si_jax.consolidate(moved(resting, "device"), params)
    expected = si_jax.consolidate(opt_state, params)
    chex.assert_trees_all_equal(after, expected, strict=True)
    assert si_jax.synapses(after).importance["w"].all()
    again = moved(moved(after, "pinned_host"), "device")
    far = jax.tree.map(lambda x: x + 1, params)
    for function in (si_jax.surrogate_loss, si_jax.diagnose):
        chex.assert_trees_all_equal(function(again, far), function(expected, far))
    reset = si_jax.reset_optimizer(tx, again, params)
    chex.assert_trees_all_equal(si_jax.synapses(reset), si_jax.synapses(expected))
