"""A trainer that drops the optimizer's state goes on with it all the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import lenient

import si_jax

STRENGTH, DAMPING, STEPS = 0.5, 0.1, 7
ADAM = lenient(optax.adam(0.05))
FORMS = {
    "wrapper": si_jax.with_synaptic_intelligence(ADAM, STRENGTH, damping=DAMPING),
    "link": optax.chain(si_jax.synaptic_intelligence(STRENGTH, damping=DAMPING), ADAM),
    "injected": optax.inject_hyperparams(
        functools.partial(si_jax.with_synaptic_intelligence, ADAM)
    )(strength=STRENGTH, damping=DAMPING),
}


def start(dtype=jnp.float32):
    return {"w": jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3), "b": jnp.ones(2)}


def loss(params, target):
    outputs = jnp.tanh(params["w"].astype(jnp.float32).sum(axis=1) + params["b"])
    return jnp.sum((outputs - target) ** 2)


def step(tx, target, params, opt_state, *, passed=True):
    grads = jax.grad(loss)(params, target)
    extra = {"params": params} if passed else {}
    updates, opt_state = tx.update(grads, opt_state, **extra)
    return optax.apply_updates(params, updates), opt_state


def loop(tx, target, params):
    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state = step(tx, target, params, opt_state)
    return params


def loop_without_params(tx, target, params):
    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state = step(tx, target, params, opt_state, passed=False)
    return params


def donating(tx, target, params):
    params = jax.tree.map(jnp.copy, params)
    opt_state = tx.init(params)
    donated = jax.jit(functools.partial(step, tx, target), donate_argnums=(0, 1))
    for _ in range(STEPS):
        params, opt_state = donated(params, opt_state)
    return params


@functools.partial(jax.jit, static_argnums=0)
def one_program(tx, target, params):
    """Compiled once, run for every task: ``init`` is in it, too."""

    def body(carry, _):
        return step(tx, target, *carry), None

    return jax.lax.scan(body, (params, tx.init(params)), length=STEPS)[0][0]


TRAINERS = {x.__name__: x for x in (loop, loop_without_params, donating, one_program)}


def kept(inner, tasks):
    """The same in a loop that keeps the state: what it must be."""
    params = start()
    opt_state = inner.init(params)
    for task in tasks:
        for _ in range(STEPS):
            params, opt_state = step(inner, task, params, opt_state)
        opt_state = si_jax.consolidate(opt_state, params)
    return params, opt_state


def close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_several_trainings_are_as_one_that_keeps_its_state(form, trainer):
    inner, tasks = FORMS[form], (0.5, -0.5, 0.2)
    tx, params = si_jax.persistent(inner), start()
    for task in tasks:
        params = TRAINERS[trainer](tx, task, params)
        close(tx.params, params)
        tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
    expected_params, expected = kept(inner, tasks)
    close(params, expected_params)
    close(tx.opt_state, expected)
    structures = map(jax.tree.structure, (tx.opt_state, expected))
    assert len(set(structures)) == 1


def test_path_integral_is_that_of_the_steps():
    inner = optax.chain(optax.clip(0.3), optax.sgd(0.1, momentum=0.9))
    tx = si_jax.persistent(si_jax.with_synaptic_intelligence(inner, STRENGTH))
    params, opt_state = start(), tx.init(start())
    account = dict.fromkeys(params, 0.0)
    for _ in range(STEPS):
        grads = jax.grad(loss)(params, 0.5)
        before = params
        params, opt_state = step(tx, 0.5, params, opt_state)
        for name, g in grads.items():
            moved = np.subtract(params[name], before[name], dtype=np.float64)
            account[name] -= np.asarray(g, np.float64) * moved
    close(si_jax.synapses(tx.opt_state).path_integral, account)


def test_what_is_still_running_is_waited_for():
    tx = si_jax.persistent(optax.sgd(1e-3))

    def body(carry, _):
        matrix, opt_state = carry
        updates, opt_state = tx.update(matrix @ matrix / 300, opt_state)
        return (optax.apply_updates(matrix, updates), opt_state), None

    matrix = jnp.eye(300) + 0.1
    train = jax.jit(lambda m: jax.lax.scan(body, (m, tx.init(m)), length=30)[0][0])
    trained = train(matrix)
    assert (tx.params == trained).all()  # nothing has waited for it before


def test_memory_is_put_in_before_the_first_training():
    tx = si_jax.persistent(FORMS["wrapper"])
    tx.init(start())
    importance = jax.tree.map(jnp.ones_like, start())
    tx.opt_state = si_jax.add_importance(tx.opt_state, importance)
    loop(tx, 0.5, start())
    close(si_jax.synapses(tx.opt_state).importance, importance)


def test_moments_start_afresh_where_they_are_reset():
    inner = FORMS["wrapper"]
    tx, params = si_jax.persistent(inner), start()
    params = loop(tx, 0.5, params)
    assert optax.tree.get(tx.opt_state, "count") == STEPS
    tx.opt_state = si_jax.reset_optimizer(inner, tx.opt_state, tx.params)
    loop(tx, 0.5, params)
    assert optax.tree.get(tx.opt_state, "count") == STEPS


def test_random_keys_and_narrow_types_come_back():
    def update(updates, key, params=None):
        del params
        key, _ = jax.random.split(key)
        return jax.tree.map(lambda g: (-0.1 * g).astype(g.dtype), updates), key

    inner = optax.GradientTransformation(
        lambda _: jax.random.key(3, impl="rbg"), update
    )
    tx, params = si_jax.persistent(inner), start(jnp.bfloat16)
    expected = jax.random.key(3, impl="rbg")
    for _ in range(2):
        params = one_program(tx, 0.5, params)
        for _ in range(STEPS):
            expected, _ = jax.random.split(expected)
    assert tx.opt_state == expected
    assert tx.params["w"].dtype == jnp.bfloat16
    close(tx.params["w"].astype(jnp.float32), params["w"].astype(jnp.float32))


def test_refuses_parameters_of_other_shapes():
    tx = si_jax.persistent(FORMS["wrapper"])
    loop(tx, 0.5, start())
    with pytest.raises(ValueError, match="make another one"):
        tx.init({"w": jnp.ones((3, 3)), "b": jnp.ones(3)})


def test_refuses_the_state_of_another_optimizer():
    tx = si_jax.persistent(FORMS["wrapper"])
    tx.init(start())
    link = FORMS["link"].init(start())
    with pytest.raises(ValueError, match="of another optimizer"):
        tx.opt_state = link
    tx.opt_state = si_jax.carry_over(link, into=tx.opt_state)


def test_carries_over_into_the_one_for_a_network_that_grew():
    tx = si_jax.persistent(FORMS["wrapper"])
    params = loop(tx, 0.5, start())
    tx.opt_state = si_jax.consolidate(tx.opt_state, tx.params)
    grown = {"w": jnp.zeros((3, 3)).at[:2].set(params["w"]), "b": jnp.zeros(3)}
    new = si_jax.persistent(FORMS["wrapper"])
    new.init(grown)
    new.opt_state = si_jax.carry_over(tx.opt_state, into=new.opt_state)
    loop(new, 0.5, grown)
    old, now = (si_jax.synapses(x.opt_state).importance["w"] for x in (tx, new))
    close(now, jnp.zeros((3, 3)).at[:2].set(old))


def test_says_that_there_is_no_state_yet():
    tx = si_jax.persistent(FORMS["wrapper"])
    with pytest.raises(ValueError, match="no state yet"):
        tx.opt_state  # noqa: B018


def test_many_runs_at_once_are_refused():
    tx = si_jax.persistent(optax.sgd(0.1))
    with pytest.raises(ValueError, match="vmap"):
        jax.vmap(tx.init)(jnp.ones((2, 3)))
