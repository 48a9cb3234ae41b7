"""Both forms against a float64 NumPy account of what the parameters did."""

import hypothesis
import hypothesis.strategies as st
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

    def task(self, visited, end, damping=DAMPING):
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
            lambda o, w, r, p: o + w / ((p - r) ** 2 + damping),
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_parameters(form, dtype):
    """Δθ is what the rounded parameters moved; ω does not stall."""
    params = init(dtype)
    tx = FORMS[form](lenient(optax.adam(1e-3)), STRENGTH, DAMPING)
    oracle = Oracle(params)
    for visited, end, opt_state in train(tx, params):
        oracle.task(visited, end)
        synapses = si_jax.synapses(opt_state)
        assert synapses.importance["bias"].dtype == jnp.float32
        assert synapses.reference["bias"].dtype == dtype
        assert_close(synapses.importance, oracle.importance, rtol=1e-4, atol=1e-5)
        assert_close(synapses.reference, oracle.reference, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_subnormal_float16_parameters(form):
    tx = FORMS[form](optax.sgd(1.0), 0.0, DAMPING)
    params = jnp.array([5e-6], jnp.float16)
    opt_state = tx.init(params)
    grads = jnp.array([2e-6], jnp.float16)
    updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    after = optax.apply_updates(params, updates)
    _, opt_state = tx.update(grads, opt_state, after)
    moved = np.float64(after) - np.float64(params)
    omega = si_jax.synapses(opt_state).path_integral
    if form == "link":  # has seen one movement, the wrapper two
        np.testing.assert_allclose(omega, -np.float64(grads) * moved, rtol=1e-5)
    assert (omega > 0).all()


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(
    shapes=st.lists(st.sampled_from([(), (1,), (3,), (2, 3)]), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strength=st.floats(0, 2),
    damping=st.floats(1e-3, 10),
    seed=st.integers(0, 2**16),
)
def test_any_tree_any_tasks(shapes, steps, strength, damping, seed):
    """Both forms and the oracle, on random gradients."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        start = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        for form in FORMS.values():
            tx = form(optax.sgd(0.1, momentum=0.5), strength, damping)
            params, opt_state, oracle = start, tx.init(start), Oracle(start)
            noise = np.random.default_rng(seed)
            for count in steps:
                visited = []
                for _ in range(count):
                    grads = [jnp.asarray(noise.normal(size=shape)) for shape in shapes]
                    visited.append((grads, params))
                    updates, opt_state = tx.update(grads, opt_state, params)
                    params = optax.apply_updates(params, updates)
                opt_state = si_jax.consolidate(opt_state, params)
                oracle.task(visited, params, damping)
                synapses = si_jax.synapses(opt_state)
                assert_close(synapses.importance, oracle.importance, rtol=1e-8)
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
