"""Both forms against a float64 NumPy account of what the parameters did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import FORMS, OPTIMIZERS, init, lenient, train

import si_jax

STRENGTH, DAMPING = 0.5, 0.01
TOLERANCE = {jnp.float64: {"rtol": 1e-9}, jnp.float32: {"rtol": 2e-4, "atol": 2e-6}}


class Oracle:
    """Synaptic Intelligence by the book: watches θ and g from outside, in float64."""

    def __init__(self, params, *, nonnegative=True):
        self.reference = self.f64(params)
        self.importance = jax.tree.map(np.zeros_like, self.reference)
        self.nonnegative = nonnegative

    @staticmethod
    def f64(tree):
        return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

    def penalty(self, params):
        terms = jax.tree.map(
            lambda o, r, p: np.sum(o * (r - p) ** 2),
            self.importance,
            self.reference,
            self.f64(params),
        )
        return STRENGTH * sum(jax.tree.leaves(terms))

    def task(self, visited, end):
        """One task: every (g, θ) visited, and the θ it ended with."""
        params = [self.f64(p) for _, p in visited] + [self.f64(end)]
        omega = jax.tree.map(np.zeros_like, self.reference)
        for (grads, _), before, after in zip(visited, params, params[1:], strict=False):
            omega = jax.tree.map(
                lambda w, g, b, a: w - g * (a - b),
                omega,
                self.f64(grads),
                before,
                after,
            )
        total = jax.tree.map(
            lambda o, w, r, p: o + w / ((p - r) ** 2 + DAMPING),
            self.importance,
            omega,
            self.reference,
            params[-1],
        )
        if self.nonnegative:
            total = jax.tree.map(lambda o: np.maximum(o, 0), total)
        self.importance, self.reference = total, params[-1]
        return omega


def assert_close(actual, desired, **tolerance):
    jax.tree.map(
        lambda a, d: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(d, np.float64), **tolerance
        ),
        actual,
        desired,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_importance_and_reference(form, optimizer, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = init(dtype)
        tx = FORMS[form](OPTIMIZERS[optimizer], STRENGTH, DAMPING)
        oracle = Oracle(params)
        for visited, end, opt_state in train(tx, params):
            oracle.task(visited, end)
            synapses = si_jax.synapses(opt_state)
            assert_close(synapses.importance, oracle.importance, **TOLERANCE[dtype])
            assert_close(synapses.reference, oracle.reference, rtol=0)
            assert_close(synapses.path_integral, jax.tree.map(np.zeros_like, end))
            probe = jax.tree.map(lambda x: x + 0.1, end)
            np.testing.assert_allclose(
                si_jax.surrogate_loss(opt_state, probe),
                oracle.penalty(probe),
                **TOLERANCE[dtype],
            )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_trajectory(form, optimizer):
    """The parameters go where the bare optimizer takes them on g + 2cΩ(θ − θ̃)."""
    with jax.enable_x64(True):
        params = init(jnp.float64)
        tx = FORMS[form](OPTIMIZERS[optimizer], STRENGTH, DAMPING)
        oracle, inner = Oracle(params), OPTIMIZERS[optimizer]
        expected, inner_state = params, inner.init(params)
        for visited, end, _ in train(tx, params):
            for grads, actual in visited:
                assert_close(actual, expected, rtol=1e-9)
                pulled = jax.tree.map(
                    lambda g, p, o, r: g + 2 * STRENGTH * jnp.asarray(o) * (p - r),
                    grads,
                    expected,
                    oracle.importance,
                    oracle.reference,
                )
                updates, inner_state = inner.update(pulled, inner_state, expected)
                expected = optax.apply_updates(expected, updates)
            oracle.task(visited, end)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_link_equals_wrapper(optimizer):
    def run(form):
        tx = FORMS[form](OPTIMIZERS[optimizer], STRENGTH, DAMPING)
        return train(tx, init())

    for (_, p, s), (_, q, t) in zip(run("link"), run("wrapper"), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert_close(
            si_jax.synapses(s).importance,
            si_jax.synapses(t).importance,
            rtol=1e-4,
            atol=1e-6,
        )


def test_link_sees_scaling_and_projection_after_it():
    with jax.enable_x64(True):
        params = init(jnp.float64)
        tx = optax.chain(
            si_jax.synaptic_intelligence(STRENGTH, DAMPING),
            lenient(optax.adam(0.02)),
            optax.scale(0.5),
            optax.add_decayed_weights(-1e-3),
        )
        oracle = Oracle(params)
        norm = optax.tree.norm(params)

        def on_the_ball(p):  # outside of optax altogether
            return optax.projections.projection_l2_ball(p, 0.9 * norm)

        for visited, end, opt_state in train(tx, params, project=on_the_ball):
            oracle.task(visited, end)
            synapses = si_jax.synapses(opt_state)
            assert_close(synapses.importance, oracle.importance, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_parameters(form):
    """Δθ is what the rounded parameters moved; ω does not stall."""
    params = init(jnp.bfloat16)
    tx = FORMS[form](lenient(optax.adam(1e-3)), STRENGTH, DAMPING)
    oracle = Oracle(params)
    for visited, end, opt_state in train(tx, params):
        oracle.task(visited, end)
        synapses = si_jax.synapses(opt_state)
        assert synapses.importance["bias"].dtype == jnp.float32
        assert synapses.reference["bias"].dtype == jnp.bfloat16
        assert_close(synapses.importance, oracle.importance, rtol=1e-4, atol=1e-5)
        assert_close(synapses.reference, oracle.reference, rtol=0)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_negative_sums(form, nonnegative):
    """Climbing leaves ω < 0; ``nonnegative=False`` is eq. 5 to the letter."""
    with jax.enable_x64(True):
        params = init(jnp.float64)
        tx = FORMS[form](optax.sgd(-0.01), 0.01, DAMPING, nonnegative=nonnegative)
        oracle = Oracle(params, nonnegative=nonnegative)
        for visited, end, opt_state in train(tx, params):
            oracle.task(visited, end)
            importance = si_jax.synapses(opt_state).importance
            assert_close(importance, oracle.importance, rtol=1e-8)
            assert (importance["bias"] < 0).any() != nonnegative


def test_clamp_acts_on_the_cumulated_sum():
    """A negative ω lowers an Ω earned before; only the sum is kept from below zero."""
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.5), 0.0, damping=1.0)
    params = jnp.zeros(2)
    opt_state = tx.init(params)
    for omega, importance in [([2.0, 2.0], [2.0, 2.0]), ([-1.0, -3.0], [1.0, 0.0])]:
        opt_state = opt_state._replace(
            synapses=opt_state.synapses._replace(path_integral=jnp.array(omega))
        )
        opt_state = si_jax.consolidate(opt_state, params)
        assert_close(si_jax.synapses(opt_state).importance, jnp.array(importance))
