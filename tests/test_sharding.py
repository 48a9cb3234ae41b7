"""Models too large for one device: the state lies where its parameters lie."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problem import FORMS, OPTIMIZERS, lenient

import si_jax

if jax.device_count() < 4:
    pytest.skip("needs four devices", allow_module_level=True)

SPECS = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model", None)}


def init():
    keys = jax.random.split(jax.random.key(0))
    return {
        "in": jax.random.normal(keys[0], (6, 16)) / 3,
        "out": jax.random.normal(keys[1], (16, 2)) / 4,
    }


def loss(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["in"]) @ params["out"] - y))


def batches():
    for step in range(12):
        x = jax.random.normal(jax.random.key(step), (8, 6))
        yield step, x, jnp.sin(x[:, :2] * (1 + step // 4))


def run(tx, params, place=lambda x: x):
    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for i, x, y in batches():
        params, opt_state = step(params, opt_state, place(x), place(y))
        if i % 4 == 3:
            opt_state = jax.jit(si_jax.consolidate)(opt_state, params)
    return params, opt_state


@pytest.fixture
def mesh():
    """Two by two: half of the batch and half of the parameters on each device."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=auto)


@pytest.mark.parametrize("form", FORMS)
def test_sharded_training_keeps_shardings_and_equals_one_device(form, mesh):
    tx = FORMS[form](OPTIMIZERS["adam"], 0.5, 0.01)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    batch = NamedSharding(mesh, PartitionSpec("data"))
    params, opt_state = run(
        tx, jax.device_put(init(), shardings), lambda x: jax.device_put(x, batch)
    )
    expected_params, expected_state = run(tx, init())
    chex.assert_trees_all_close(params, expected_params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        si_jax.synapses(opt_state),
        si_jax.synapses(expected_state),
        rtol=1e-3,
        atol=1e-5,
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if leaf.ndim:
            name = path[-1].key
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), path


@pytest.mark.parametrize("form", FORMS)
def test_compiled_initial_states_are_sharded_too(form, mesh):
    tx = FORMS[form](optax.sgd(0.1))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    opt_state = jax.jit(tx.init)(jax.device_put(init(), shardings))
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if leaf.ndim:
            sharding = shardings[path[-1].key]
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path


@pytest.mark.parametrize("form", FORMS)
def test_updating_and_consolidating_need_nothing_of_other_devices(form, mesh):
    """Each device by itself, with its own blocks, gets what it has of the whole."""
    tx = FORMS[form](OPTIMIZERS["adam"], 0.5, 0.01)
    params = init()

    def task(params, grads):
        opt_state = tx.init(params)
        for _ in range(2):
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            opt_state = si_jax.consolidate(opt_state, params)
        return params, si_jax.synapses(opt_state)

    specs = SPECS, si_jax.Synapses(SPECS, SPECS, SPECS)
    alone = jax.shard_map(task, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=specs)
    grads = jax.tree.map(jnp.sin, params)
    chex.assert_trees_all_close(
        jax.jit(alone)(params, grads), jax.jit(task)(params, grads), rtol=1e-6
    )


# --- Every device its part of the batch, and all of the parameters --------------------


def shard_map(step, **kwargs):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, part = PartitionSpec(), PartitionSpec("data")
    specs = {"in_specs": (whole, whole, part, part), "out_specs": whole}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, **kwargs))


def pmap(step):
    """Called like the others: of what every device has, the first is taken."""
    on_all = jax.pmap(step, "data", in_axes=(None, None, 0, 0))

    def call(params, opt_state, x, y):
        x, y = (jnp.reshape(a, (4, -1, a.shape[-1])) for a in (x, y))
        return jax.tree.map(lambda a: a[0], on_all(params, opt_state, x, y))

    return call


def mean_loss(params, x, y):
    return jax.lax.pmean(loss(params, x, y), "data")


def of_both(params, x, y):
    """The guide's way."""
    return jax.lax.pmean(jax.grad(mean_loss)(params, x, y), "data")


def of_gradients(params, x, y):
    return jax.lax.pmean(jax.grad(loss)(params, x, y), "data")


def run_parallel(tx, parallel, gradient):
    def step(params, opt_state, x, y):
        updates, opt_state = tx.update(gradient(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    on_all = parallel(step)
    params, opt_state = init(), tx.init(init())
    for i, x, y in batches():
        params, opt_state = on_all(params, opt_state, x, y)
        if i % 4 == 3:
            opt_state = si_jax.consolidate(opt_state, params)
    return params, opt_state


unchecked = functools.partial(shard_map, check_vma=False)


@pytest.mark.parametrize(
    ("parallel", "mean"),
    [
        (shard_map, of_both),
        (shard_map, jax.grad(mean_loss)),
        (unchecked, of_both),
        (unchecked, of_gradients),
        (pmap, of_both),
        (pmap, of_gradients),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_data_parallel_training_equals_one_device(form, parallel, mean):
    tx = FORMS[form](OPTIMIZERS["adam"], 0.5, 0.01)
    params, opt_state = run_parallel(tx, parallel, mean)
    expected, state = run(tx, init())
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
    omega, expected = (si_jax.synapses(s).importance for s in (opt_state, state))
    assert max(x.max() for x in expected.values()) > 1
    chex.assert_trees_all_close(omega, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_taken_for_a_mean_shows_in_what_was_earned(form):
    """Adam hides it: Σω against the drop of the loss does not."""
    tx = FORMS[form](lenient(optax.adam(1e-3)))
    _, x, y = next(batches())
    for reduce, times in ((jax.lax.pmean, 1), (jax.lax.psum, 4)):

        def step(params, opt_state, x, y, reduce=reduce):
            grads = reduce(jax.grad(loss)(params, x, y), "data")
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        on_all = unchecked(step)
        params, opt_state = init(), tx.init(init())
        for _ in range(20):
            params, opt_state = on_all(params, opt_state, x, y)
        drop = loss(init(), x, y) - loss(params, x, y)
        earned = sum(si_jax.diagnose(opt_state, params).path_integral.values())
        np.testing.assert_allclose(earned, times * drop, rtol=0.1)


def test_parameters_that_grow_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1))
    small, large = (jax.device_put(jnp.arange(n, dtype="f"), rows) for n in (8.0, 12.0))
    with jax.set_mesh(mesh):
        opt_state = si_jax.add_importance(tx.init(small), small)
        grown = si_jax.synapses(si_jax.carry_over(opt_state, into=tx.init(large)))
    assert grown.importance.sharding.is_equivalent_to(rows, 1)
    np.testing.assert_array_equal(grown.importance, [*range(8), 0, 0, 0, 0])
    np.testing.assert_array_equal(grown.reference, range(12))
