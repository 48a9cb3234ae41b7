"""Tasks that end with other weights than the last: the best, or an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from problem import FORMS, grad, init, lenient

import si_jax

forms = pytest.mark.parametrize("form", FORMS)
DAMPING, STEPS, BEST = 0.01, 8, 3
ADAM = lenient(optax.adam(0.05))


def run(tx, params, opt_state, task=0):
    """The state and the parameters after each step, and ω by a float64 account."""
    found, omega = [(params, opt_state, 0.0)], 0.0
    for step in range(STEPS):
        grads = grad(params, task, step)
        updates, opt_state = tx.update(grads, opt_state, params)
        before, params = params, optax.apply_updates(params, updates)
        moved = np.float64(params["kernel"]) - before["kernel"]
        omega = omega - np.float64(grads["kernel"]) * moved
        found.append((params, opt_state, omega))
    return found


def eq_5(omega, end, start, importance=0.0):
    far = np.float64(end["kernel"]) - np.float64(start["kernel"])
    return np.maximum(importance + omega / (far**2 + DAMPING), 0)


def held(opt_state):
    return si_jax.synapses(opt_state).importance["kernel"]


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@forms
def test_the_best_weights_with_the_state_of_their_step(form):
    tx = FORMS[form](ADAM, 0.5, DAMPING)
    found = run(tx, init(), tx.init(init()))
    params, opt_state, omega = found[BEST]
    expected = eq_5(omega, params, init())
    np.testing.assert_allclose(
        held(si_jax.consolidate(opt_state, params)), expected, **CLOSE
    )
    last = held(si_jax.consolidate(found[-1][1], params))
    assert np.abs(last / expected - 1).max() > 0.5  # with the last step's, it is wrong


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "kept"])
@forms
def test_an_average_is_consolidated_after_the_last_weights(form, reset):
    """Ω is eq. 5's of the path that was walked, θ̃ is the average; and so on."""
    tx = FORMS[form](ADAM, 0.0, DAMPING)
    start, opt_state, expected = init(), tx.init(init()), 0.0
    for task in range(2):
        found = run(tx, start, opt_state, task)
        last, opt_state, omega = found[-1]
        average = jax.tree.map(lambda *x: sum(x) / len(x), *(x[0] for x in found))
        expected = eq_5(omega, last, start, expected)
        opt_state = si_jax.consolidate(opt_state, last)
        opt_state = si_jax.consolidate(opt_state, average)
        if reset:
            opt_state = si_jax.reset_optimizer(tx, opt_state, average)
        np.testing.assert_allclose(held(opt_state), expected, **CLOSE)
        np.testing.assert_array_equal(
            si_jax.synapses(opt_state).reference["kernel"], average["kernel"]
        )
        assert si_jax.surrogate_loss(opt_state, average) == 0
        start = average


@forms
def test_the_average_of_schedule_free(form):
    """x is where optax finds it: in the state that Synaptic Intelligence is around."""
    inner = lenient(contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9))
    tx = FORMS[form](inner, 0.5, DAMPING)
    last, opt_state, omega = run(tx, init(), tx.init(init()))[-1]
    own = opt_state.inner_state if form == "wrapper" else opt_state[1]
    average = contrib.schedule_free_eval_params(own, last)

    plain = inner.init(init())
    params = init()
    for step in range(STEPS):
        updates, plain = inner.update(grad(params, 0, step), plain, params)
        params = optax.apply_updates(params, updates)
    expected = contrib.schedule_free_eval_params(plain, params)
    for name, x in average.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-6)

    opt_state = si_jax.consolidate(opt_state, last)
    opt_state = si_jax.consolidate(opt_state, average)
    np.testing.assert_allclose(held(opt_state), eq_5(omega, last, init()), **CLOSE)
    opt_state = si_jax.reset_optimizer(tx, opt_state, average)
    own = opt_state.inner_state if form == "wrapper" else opt_state[1]
    again = contrib.schedule_free_eval_params(own, average)
    np.testing.assert_allclose(again["kernel"], average["kernel"], rtol=1e-5)
    assert jnp.isfinite(si_jax.surrogate_loss(opt_state, last))
