"""The optimizer started afresh: random keys go on, states that grow, odd shapes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib
from problem import FORMS, lenient

import si_jax

forms = pytest.mark.parametrize("form", FORMS)
KEY = jax.random.key(3)


def raw_noise(seed):
    """Noise from a key that is a vector of uint32, as optimizers of old had it."""

    def init(params):
        del params
        return {"key": jax.random.PRNGKey(seed), "count": jnp.zeros([], jnp.uint32)}

    def update(updates, state, params=None):
        del params
        key, now = jax.random.split(state["key"])
        noise = optax.tree.random_like(now, updates)
        state = {"key": key, "count": state["count"] + jnp.uint32(1)}
        return optax.tree.add(updates, noise), state

    return optax.GradientTransformation(init, update)


NOISY = {
    "add_noise": lambda: optax.add_noise(0.1, 0.5, key=KEY),
    "raw": lambda: raw_noise(3),
    "privacy": lambda: optax.chain(
        contrib.differentially_private_aggregate(1.0, 1.0, key=KEY), optax.sgd(0.1)
    ),
}


def noises(tx, steps, reset_after=None):
    """The updates of a gradient of zero: noise alone."""
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    zeros, state, found = jax.tree.map(jnp.zeros_like, params), tx.init(params), []
    for step in range(steps):
        if step == reset_after:
            state = si_jax.reset_optimizer(tx, state, params)
        updates, state = tx.update(zeros, state, params)
        found.append(updates["w"])
    return np.stack(found), state


@pytest.mark.parametrize("noise", ["add_noise", "raw"])
@forms
def test_noise_is_not_drawn_again_after_a_reset(form, noise):
    tx = FORMS[form](lenient(NOISY[noise]()))
    plain, _ = noises(tx, 4)
    reset, state = noises(tx, 4, reset_after=2)
    assert len(np.unique(reset, axis=0)) == 4
    assert optax.tree.get(state, "count") == 2
    if noise == "raw":  # whose size does not depend on the count
        np.testing.assert_array_equal(reset, plain)


def test_the_keys_of_private_learning_go_on():
    tx = si_jax.with_synaptic_intelligence(NOISY["privacy"]())
    params = {"w": jnp.zeros(3)}
    per_example = {"w": jnp.ones((2, 3))}
    state = tx.init(params)
    _, inner = NOISY["privacy"]().update(per_example, state.inner_state, params)
    state = state._replace(inner_state=inner)
    reset = jax.jit(lambda s, p: si_jax.reset_optimizer(tx, s, p))(state, params)
    keys = [optax.tree.get(s, "rng_key") for s in (state, reset, tx.init(params))]
    used, kept, first = map(jax.random.key_data, keys)
    np.testing.assert_array_equal(kept, used)
    assert (kept != first).any()


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="new in optax 0.2.7")
@forms
def test_a_state_that_grew_at_its_first_update(form):
    ema = optax.measure_with_ema(optax.tree.norm, decay=0.9)
    measures = {"norm": optax.tree.norm, "ema": ema}
    inner = optax.chain(optax.sgd(0.1, momentum=0.9), optax.monitor(measures))
    tx, params = FORMS[form](lenient(inner)), {"w": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    reset = si_jax.reset_optimizer(tx, state, params)
    assert jax.tree.structure(reset) == jax.tree.structure(state)
    chex.assert_trees_all_equal(si_jax.synapses(reset), si_jax.synapses(state))
    assert not optax.tree.get(reset, "trace")["w"].any()
    plain = FORMS[form](optax.chain(optax.sgd(0.1), optax.monitor(measures)))
    with pytest.raises(ValueError, match="not made by this tx"):
        si_jax.reset_optimizer(plain, state, params)
    tx.update(params, reset, params)

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, params)
    reset = si_jax.reset_optimizer(tx, optimizer.opt_state, params)
    optimizer.opt_state = reset
    optimizer.update(model, params)


@forms
def test_scalars_and_empty_leaves(form):
    """A temperature, and a layer that a setting left without units."""
    tx = FORMS[form](lenient(optax.adam(0.1)), 1.0, 0.1)
    params = {"scale": jnp.array(1.0), "none": jnp.zeros((0, 3))}
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    state = si_jax.consolidate(state, params)
    gain = 0.1 / (0.1**2 + 0.1)  # ω = 1 × 0.1 moved
    for after in (
        state,
        si_jax.reset_optimizer(tx, state, params),
        si_jax.carry_over(state, into=tx.init(params)),
        si_jax.carry_over(state, into=tx.init(params | {"none": jnp.zeros((2, 3))})),
    ):
        held = si_jax.synapses(after)
        np.testing.assert_allclose(held.importance["scale"], gain, rtol=1e-5)
        assert held.reference["scale"] == params["scale"]
    report = si_jax.diagnose(state, params)
    np.testing.assert_allclose(report.max_importance["scale"], gain, rtol=1e-5)
    assert all(column["none"] == 0 for column in report)


def test_keys_in_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = si_jax.with_synaptic_intelligence(lenient(raw_noise(3)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, params)
    used = optax.tree.get(optimizer.opt_state, "key")
    reset = si_jax.reset_optimizer(tx, optimizer.opt_state, params)
    np.testing.assert_array_equal(optax.tree.get(reset, "key")[...], used[...])
    optimizer.opt_state = reset
    optimizer.update(model, params)


def test_counts_are_no_keys():
    """A vector of uint32 that is as long as no key starts afresh."""
    init = {"seen": jnp.zeros(5, jnp.uint32)}
    counting = optax.GradientTransformation(
        lambda _: init, lambda g, s, _=None: (g, jax.tree.map(lambda x: x + 1, s))
    )
    tx, params = si_jax.with_synaptic_intelligence(counting), {"w": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    reset = si_jax.reset_optimizer(tx, state, params)
    assert optax.tree.get(state, "seen").all()
    assert not optax.tree.get(reset, "seen").any()


@forms
def test_a_reset_under_cond_after_x64_was_switched_on(form):
    tx, params = FORMS[form](lenient(optax.sgd(0.1))), {"w": jnp.ones(3)}
    state = tx.init(params)
    with jax.enable_x64(True):
        reset = jax.lax.cond(
            True, lambda s: si_jax.reset_optimizer(tx, s, params), lambda s: s, state
        )
    chex.assert_trees_all_equal(reset, state, strict=True)
