"""Elastic weight consolidation, against closed forms and the sum of its penalties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import OPTIMIZERS, init, lenient, train

import si_jax
from si_jax import ewc


def random_tree(seed, positive=False):
    rng = np.random.default_rng(seed)

    def leaf(p):
        values = rng.normal(size=p.shape)
        return jnp.asarray(np.square(values) if positive else values, jnp.float32)

    return jax.tree.map(leaf, init())


# --- The penalty ----------------------------------------------------------------------


def test_merged_penalty_is_the_sum_of_the_tasks_up_to_a_constant():
    tx = ewc.elastic_weight_consolidation(strength=0.7)
    state = tx.init(init())
    tasks = [(random_tree(i, positive=True), random_tree(10 + i)) for i in range(4)]
    for importance, theta in tasks:
        state = ewc.consolidate(state, theta, importance)

    def separate(params):
        terms = jax.tree.map(
            lambda f, t, p: 0.7 * jnp.sum(f * jnp.square(t - p)),
            *map(list, zip(*((f, t, params) for f, t in tasks), strict=True)),
        )
        return sum(jax.tree.leaves(terms))

    points = [random_tree(100 + i) for i in range(5)]
    merged = [si_jax.surrogate_loss(state, p) for p in points]
    difference = np.array([separate(p) for p in points]) - np.array(merged)
    np.testing.assert_allclose(difference, difference[0], rtol=1e-4)
    assert difference[0] > 1, "the constant is no accident"
    pulled, _ = tx.update(jax.tree.map(jnp.zeros_like, init()), state, points[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        pulled,
        jax.grad(separate)(points[0]),
    )


def test_what_no_task_needs_is_not_held():
    tx = ewc.elastic_weight_consolidation(strength=1.0)
    state = tx.init(jnp.zeros(2))
    for theta in (jnp.array([1.0, 1.0]), jnp.array([2.0, 2.0])):
        state = ewc.consolidate(state, theta, jnp.array([1.0, 0.0]))
    assert np.isfinite(state.reference).all()
    pulled, _ = tx.update(jnp.zeros(2), state, jnp.array([5.0, 5.0]))
    assert pulled.tolist() == [2 * 2 * (5 - 1.5), 0]


def test_online_ewc_forgets_gracefully():
    """Schwarz et al., 2018: F ← γF + F', θ̃ ← θ."""
    tx = ewc.elastic_weight_consolidation(strength=1.0, decay=0.5)
    state = tx.init(jnp.zeros(1))
    state = ewc.consolidate(state, jnp.array([1.0]), jnp.array([4.0]))
    state = ewc.consolidate(state, jnp.array([3.0]), jnp.array([1.0]))
    assert state.importance.tolist() == [0.5 * 4 + 1]
    assert state.reference.tolist() == [3.0]


def boundary(_, opt_state, params):
    return ewc.consolidate(opt_state, params, random_tree(1, positive=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_off_it_is_the_plain_optimizer(name):
    inner = OPTIMIZERS[name]
    off = optax.chain(ewc.elastic_weight_consolidation(0.0), inner)
    on = optax.chain(ewc.elastic_weight_consolidation(5.0), inner)
    plain, off, on = (
        train(tx, init(), tasks=2, boundary=end)
        for tx, end in ((inner, lambda *args: args[1]), (off, boundary), (on, boundary))
    )
    for task in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
            off[task][1],
            plain[task][1],
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        on[0][1],
        plain[0][1],
    )
    assert not np.allclose(on[1][1]["kernel"], plain[1][1]["kernel"], rtol=1e-3)


# --- In any container -----------------------------------------------------------------

ADAM = lenient(optax.adam(0.01))
LINK = ewc.elastic_weight_consolidation(2.0)
CONTAINERS = {
    "chain": optax.chain(LINK, ADAM),
    "named_chain": optax.named_chain(("ewc", LINK), ("adam", ADAM)),
    "multi_steps": optax.MultiSteps(optax.chain(LINK, ADAM), 2),
    "masked": optax.chain(optax.masked(LINK, {"kernel": True, "bias": False}), ADAM),
    "with SI": si_jax.with_synaptic_intelligence(optax.chain(LINK, ADAM), 0.5),
    "beside SI": optax.chain(si_jax.synaptic_intelligence(0.5), LINK, ADAM),
    "swept": optax.inject_hyperparams(ewc.elastic_weight_consolidation)(strength=2.0),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_wherever_it_sits_it_is_found_and_kept(name):
    tx, params = CONTAINERS[name], init()
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        update = jax.jit(tx.update)
        for seed in range(3):
            _, state = update(random_tree(seed), state, params)
        before = jax.tree.map(jnp.shape, state)
        consolidated = jax.jit(ewc.consolidate)(
            state, params, random_tree(1, positive=True)
        )
        assert jax.tree.map(jnp.shape, consolidated) == before
        away = jax.tree.map(lambda p: p + 1, params)
        held = ["kernel"] if name == "masked" else ["kernel", "bias"]
        expected = 2 * sum(float(random_tree(1, True)[k].sum()) for k in held)
        penalty = si_jax.surrogate_loss(consolidated, away)
        np.testing.assert_allclose(penalty, expected, rtol=1e-5)
        fresh = si_jax.reset_optimizer(tx, consolidated, params)
        assert jax.tree.structure(fresh) == jax.tree.structure(consolidated)
        np.testing.assert_allclose(
            si_jax.surrogate_loss(fresh, away), expected, rtol=1e-5
        )
        for moment in optax.tree.get_all_with_path(fresh, "mu"):
            assert not any(x.any() for x in jax.tree.leaves(moment[1]))


def test_surrogate_loss_adds_what_both_hold():
    tx = optax.chain(si_jax.synaptic_intelligence(0.5), LINK, optax.sgd(0.1))
    params, ones = init(), jax.tree.map(jnp.ones_like, init())
    state = tx.init(params)
    _, state = tx.update(ones, state, params)
    moved = jax.tree.map(lambda p: p - 0.1, params)
    state = si_jax.consolidate(state, moved)
    state = ewc.consolidate(state, moved, ones)
    importance = 0.1 / (0.1**2 + 0.1)
    expected = (0.5 * importance + 2.0) * 15 * 0.1**2
    np.testing.assert_allclose(
        si_jax.surrogate_loss(state, params), expected, rtol=1e-4
    )


def test_strengths_are_swept_by_vmap():
    def pulled(strength):
        tx = ewc.elastic_weight_consolidation(strength)
        state = tx.init(jnp.zeros(2))
        state = ewc.consolidate(state, jnp.zeros(2), jnp.array([1.0, 3.0]))
        return tx.update(jnp.zeros(2), state, jnp.ones(2))[0]

    pulls = jax.vmap(pulled)(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(pulls, [[0, 0], [1, 3], [2, 6]])


def test_narrow_parameters_keep_a_wide_memory_and_their_dtype():
    params = init(jnp.bfloat16)
    state = LINK.init(params)
    state = ewc.consolidate(state, params, random_tree(1, positive=True))
    updates, state = LINK.update(params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    memory = jax.tree.leaves((state.importance, state.reference))
    assert {x.dtype for x in memory} == {jnp.dtype(jnp.float32)}


def test_a_line_search_sees_the_penalty_inside_the_wrapper():
    """As on the sum of loss and penalty; a link alone refuses what it cannot change."""
    theta, fisher = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.5])}

    def loss(params):
        return jnp.sum(jnp.square(params["w"]) + jnp.square(jnp.square(params["w"])))

    def total(params):
        return loss(params) + 2 * jnp.sum(fisher["w"] * (params["w"] - theta["w"]) ** 2)

    def run(tx, opt_state, function):
        params = theta
        for _ in range(3):
            value, grads = jax.value_and_grad(function)(params)
            updates, opt_state = jax.jit(tx.update, static_argnames="value_fn")(
                grads, opt_state, params, value=value, grad=grads, value_fn=function
            )
            params = optax.apply_updates(params, updates)
        return params

    chain, lbfgs = optax.chain(LINK, optax.lbfgs()), optax.lbfgs()
    tx = si_jax.with_synaptic_intelligence(chain, strength=0.0)
    held = ewc.consolidate(tx.init(theta), theta, fisher)
    expected = run(lbfgs, lbfgs.init(theta), total)
    np.testing.assert_allclose(run(tx, held, loss)["w"], expected["w"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"value_fn .* si_jax.with_synaptic_intel"):
        run(chain, chain.init(theta), loss)


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("array", [np.array, jnp.array])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "negative")],
)
def test_an_importance_that_is_none_is_refused_by_name(bad, message, array, compiled):
    """Also where it is a constant of what is compiled."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    fisher = {"a": array([0.0, 1.0], "f4"), "b": array([1.0, bad], "f4")}
    state = LINK.init(params)
    for add in (
        lambda state: ewc.consolidate(state, params, fisher),
        lambda state: si_jax.add_importance(state, fisher),
    ):
        with pytest.raises(
            ValueError, match=rf"importance\['b'\] is {message}: the sur"
        ):
            compiled(add)(state)


def test_a_traced_importance_is_taken_as_it_is():
    state = jax.jit(ewc.consolidate)(LINK.init(jnp.zeros(1)), jnp.ones(1), -jnp.ones(1))
    assert state.importance.tolist() == [-1]


def test_what_is_written_to_numpy_arrays_later_is_not_seen():
    def ones():
        return np.ones(1_000_000, np.float32)

    params = ones()
    state = LINK.init(params)
    params[:] = 7
    assert (state.reference == 1).all()
    for _ in range(5):
        params, fisher = ones(), ones()
        state = ewc.consolidate(LINK.init(jnp.zeros(params.size)), params, fisher)
        params[:], fisher[:] = 7, 7
        assert (state.reference == 1).all()
        assert (state.importance == 1).all()


def test_a_state_keeps_its_dtypes_when_x64_is_switched_on():
    params = init()
    state = LINK.init(params)
    with jax.enable_x64(True):
        updated = jax.eval_shape(LINK.update, params, state, params)[1]
    assert jax.tree.map(lambda x: x.dtype, updated) == jax.tree.map(
        lambda x: x.dtype, state
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ewc.elastic_weight_consolidation(-1.0), "strength .* must be >= 0"),
        (
            lambda: ewc.elastic_weight_consolidation(1.0, decay=0.0),
            r"decay .* \(0, 1\]",
        ),
        (
            lambda: ewc.elastic_weight_consolidation(1.0, decay=1.5),
            r"decay .* \(0, 1\]",
        ),
        (lambda: ewc.consolidate(optax.sgd(1).init(init()), init(), init()), "no EWC"),
        (
            lambda: ewc.consolidate(LINK.init(init()), init(), {"kernel": jnp.ones(3)}),
            r"importance\['kernel'\] has shape|importance\['bias'\] is missing",
        ),
        (lambda: LINK.update(init(), LINK.init(init())), "not passing `params`"),
        (lambda: LINK.init({"count": jnp.zeros(3, int)}), "real floating-point"),
        (lambda: si_jax.surrogate_loss((), init()), "no Synaptic Intelligence and no"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()
