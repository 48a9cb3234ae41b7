"""Both forms against a float64 NumPy account of what the parameters did."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
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


# --- Optimizers that evaluate the loss themselves -------------------------------------


def adversary():
    return optax.chain(contrib.normalize(), optax.sgd(0.1))


BACKTRACKING = optax.scale_by_backtracking_linesearch(15, store_grad=True)
EVALUATING = {
    "zoom": optax.lbfgs(),
    "backtracking": optax.lbfgs(linesearch=BACKTRACKING),
    "sam": contrib.sam(optax.sgd(0.02), adversary(), opaque_mode=True),
    "sophia": contrib.sophia(0.1, b2=0.5, gamma=1.0, update_interval=1),
    "polyak": optax.polyak_sgd(1.0),
    "momo": contrib.momo(0.05),
    "plateau": optax.chain(
        optax.sgd(0.1), contrib.reduce_on_plateau(0.5, patience=2, atol=0.1)
    ),
}


def arguments(name, loss, value, grads):
    """What an optimizer is passed of one loss, beside the gradient."""
    if name == "sam":
        return {"grad_fn": lambda params, _: jax.grad(loss)(params)}
    if name == "sophia":
        return {"obj_fn": loss}
    if name in ("zoom", "backtracking"):
        return {"value": value, "grad": grads, "value_fn": loss}
    return {"value": value}


def task_loss(params, task):
    """The first task asks for one weight, the second for a sum; both are steep."""
    w = params["w"]
    first = 3 * jnp.square(w[0] - 1) + jnp.square(jnp.square(w[0] - 1))
    second = jnp.square(w[0] + w[1] - 3) + 0.1 * jnp.square(jnp.sin(w[1]))
    return jnp.where(task == 0, first, second)


@pytest.mark.parametrize(
    ("name", "from_state"),
    [(name, False) for name in EVALUATING] + [("zoom", True), ("backtracking", True)],
)
def test_what_an_optimizer_evaluates_has_the_surrogate_loss(name, from_state):
    """As the bare one on the sum of both losses; ω is of the task's alone.

    In either of optax's own loops, with the value and the gradient of the task's loss.
    """
    inner = optax.with_extra_args_support(lenient(EVALUATING[name]))
    tx = si_jax.with_synaptic_intelligence(inner, STRENGTH, DAMPING)

    @jax.jit
    def step(params, opt_state, task):
        loss = functools.partial(task_loss, task=task)
        value, grads = jax.value_and_grad(loss)(params)
        if from_state:
            ask = optax.value_and_grad_from_state(loss)
            value, grads = ask(params, state=opt_state)
        extra_args = arguments(name, loss, value, grads)
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def bare_step(params, inner_state, task, importance, reference):
        def loss(p):
            strain = importance * jnp.square(reference - p["w"])
            return task_loss(p, task) + STRENGTH * jnp.sum(strain)

        value, grads = jax.value_and_grad(loss)(params)
        extra_args = arguments(name, loss, value, grads)
        updates, inner_state = inner.update(grads, inner_state, params, **extra_args)
        return optax.apply_updates(params, updates), inner_state

    with jax.enable_x64(True):
        params = expected = {"w": jnp.array([0.2, -0.3])}
        opt_state, inner_state = tx.init(params), inner.init(params)
        importance, reference = np.zeros(2), np.asarray(params["w"])
        for task in range(2):
            inner_state = jax.tree.map(  # a reset keeps random keys
                lambda new, old: old if new.dtype == jnp.uint32 else new,
                inner.init(expected),
                inner_state,
            )
            omega = np.zeros(2)
            for _ in range(12):
                before = expected
                expected, inner_state = bare_step(
                    before, inner_state, task, importance, reference
                )
                grads = jax.grad(task_loss)(before, task)["w"]
                omega -= grads * (expected["w"] - before["w"])
                params, opt_state = step(params, opt_state, task)
                np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-5)
            path_integral = si_jax.synapses(opt_state).path_integral["w"]
            np.testing.assert_allclose(path_integral, omega, rtol=1e-5, atol=1e-9)
            opt_state = si_jax.consolidate(opt_state, params)
            opt_state = si_jax.reset_optimizer(tx, opt_state, params)
            square = np.square(expected["w"] - reference)
            importance = np.maximum(importance + omega / (square + DAMPING), 0)
            reference = np.asarray(expected["w"])
            assert importance[0] > 1


def test_a_skipped_step_leaves_what_a_line_search_keeps():
    inner = optax.apply_if_finite(optax.lbfgs(), 3)
    tx = si_jax.with_synaptic_intelligence(inner, STRENGTH, DAMPING)
    loss = functools.partial(task_loss, task=1)
    params = {"w": jnp.array([0.2, -0.3])}
    opt_state = si_jax.add_importance(tx.init(params), {"w": jnp.ones(2)})

    @jax.jit
    def step(params, opt_state, grads):
        value = loss(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = step(params, opt_state, jax.grad(loss)(params))
    params, opt_state = step(params, opt_state, {"w": jnp.array([jnp.nan, 1])})
    kept = optax.value_and_grad_from_state(loss)(params, state=opt_state)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        kept,
        jax.value_and_grad(loss)(params),
    )


# --- Gradients that are no finite numbers ---------------------------------------------

MOMENTUM = optax.sgd(0.1, momentum=0.9)
SPOILT = {
    "zero_nans": (np.nan, optax.chain(optax.zero_nans(), MOMENTUM)),
    "clip": (np.inf, optax.chain(optax.clip(1.0), MOMENTUM)),
    "apply_if_finite": (-np.inf, optax.apply_if_finite(MOMENTUM, 3)),
    "lion": (np.inf, optax.lion(0.01)),
    "sign_sgd": (-np.inf, optax.sign_sgd(0.01)),
}
SPOILT_FORMS = FORMS | {
    "unbiased link": functools.partial(FORMS["link"], unbiased=True),
}


@pytest.mark.parametrize("inner", SPOILT)
@pytest.mark.parametrize("form", SPOILT_FORMS)
def test_what_is_no_finite_number_earns_nothing(form, inner):
    """One entry at one step; its neighbours and the other steps earn as ever."""
    bad, inner = SPOILT[inner]
    unbiased = form == "unbiased link"
    grads = np.random.default_rng(0).normal(1, 1, (5, 3))
    grads[2, 1] = bad
    with jax.enable_x64(True):
        tx = SPOILT_FORMS[form](lenient(inner), STRENGTH, DAMPING)
        path = [jnp.array([1.0, -1.0, 2.0])]
        opt_state, update = tx.init(path[0]), jax.jit(tx.update)
        for g in grads:
            updates, opt_state = update(jnp.asarray(g), opt_state, path[-1])
            path.append(optax.apply_updates(path[-1], updates))
        opt_state = si_jax.consolidate(opt_state, path[-1])
    credited = np.where(np.isfinite(grads), grads, 0)
    if unbiased:  # the next one, if there is one
        after = np.vstack([grads[1:], grads[-1:]])
        credited = np.where(np.isfinite(after), after, credited)
    path = np.asarray(path)
    omega = -np.sum(credited * np.diff(path, axis=0), axis=0)
    expected = np.maximum(omega / (np.square(path[-1] - path[0]) + DAMPING), 0)
    assert expected[1] > 0
    importance = si_jax.synapses(opt_state).importance
    np.testing.assert_allclose(importance, expected, rtol=1e-9)


# --- Narrow gradients -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_pull_stays_within_the_range_of_the_gradient(form, dtype):
    """But a gradient that overflowed itself still shows."""
    tx = FORMS[form](optax.sgd(1.0), STRENGTH, DAMPING)
    start = jnp.array([1.0, 1.0, 1.0], dtype)
    opt_state = tx.init(start)
    opt_state = si_jax.add_importance(opt_state, jnp.array([1e6, 100.0, 1e6]))
    grads = jnp.array([-1.0, 2.0, -jnp.inf], dtype)
    updates, _ = jax.jit(tx.update)(grads, opt_state, start + 1)
    limit = float(jnp.finfo(dtype).max)
    pulled = np.clip([1e6 - 1, 102.0, -np.inf], [-limit, -limit, -np.inf], limit)
    np.testing.assert_allclose(updates.astype(jnp.float32), -pulled, rtol=2**-8)
