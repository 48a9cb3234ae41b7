"""Importance from elsewhere, the unbiased path integral, and what is held how hard."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from optax import contrib
from problem import FORMS, OPTIMIZERS, init, lenient, train

import si_jax
from si_jax import ewc, theory

SGD = optax.sgd(0.05)
forms = pytest.mark.parametrize("form", FORMS)


def make(form, inner=SGD, **kwargs):
    return FORMS[form](inner, 0.5, 0.01, **kwargs)


def squares(tree):
    return jax.tree.map(jnp.square, tree)


def shifted(tree):
    return jax.tree.map(lambda x: x + 0.5, tree)


# --- Importance from elsewhere --------------------------------------------------------


@forms
def test_adding_a_fisher_information_is_ewc_with_one_task(form):
    params, fisher = init(), squares(init())
    elastic = optax.chain(ewc.elastic_weight_consolidation(0.5), OPTIMIZERS["adam"])
    held = make(form, OPTIMIZERS["adam"])

    class Started:
        """An optimizer whose first state is not ``init``'s."""

        def __init__(self, tx, opt_state):
            self.update, self.init = tx.update, lambda _: opt_state

    elastic = Started(elastic, ewc.consolidate(elastic.init(params), params, fisher))
    held = Started(held, si_jax.add_importance(held.init(params), fisher))
    ends = [
        train(tx, params, tasks=1, boundary=lambda _tx, s, _params: s)
        for tx in (elastic, held)
    ]
    chex.assert_trees_all_close(ends[0][0][1], ends[1][0][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@forms
def test_importance_is_added_and_nothing_else_changes(form, dtype):
    tx = make(form, state_dtype=dtype)
    ((_, params, opt_state),) = train(tx, init(), tasks=1, steps=3)
    more = squares(params)
    after = jax.jit(si_jax.add_importance)(opt_state, more)
    before, now = map(si_jax.synapses, (opt_state, after))
    expected = jax.tree.map(
        lambda a, b: a.astype(jnp.float32) + b, before.importance, more
    )
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), now.importance)
    to_a_neighbour = 2**-7 if dtype else 0
    chex.assert_trees_all_close(widened, expected, rtol=to_a_neighbour)
    chex.assert_trees_all_equal_dtypes(now.importance, before.importance)
    restored = jax.tree.map(
        lambda old, new, same: old if same else new,
        opt_state,
        after,
        optax.tree.set(
            jax.tree.map(lambda _: True, opt_state),
            importance=jax.tree.map(lambda _: False, before.importance),
        ),
    )
    chex.assert_trees_all_equal(restored, after, strict=True)


@forms
def test_importance_goes_where_its_parameters_are_remembered(form):
    parts = {"bias": make(form), "kernel": make(form), "free": SGD}
    tx = lenient(
        optax.MultiSteps(
            optax.partition(parts, {"bias": "bias", "kernel": "kernel", "out": "free"}),
            1,
        ).gradient_transformation()
    )
    params = init() | {"out": jnp.ones(2)}
    more = squares(params)
    opt_state = si_jax.add_importance(tx.init(params), more)
    report = si_jax.diagnose(opt_state, params)
    assert list(report.importance) == ["bias", "kernel"]
    for name, total in report.importance.items():
        np.testing.assert_allclose(total, more[name].sum(), rtol=1e-6)


@forms
def test_importance_in_an_nnx_optimizer(form):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(form), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    optimizer.opt_state = si_jax.add_importance(optimizer.opt_state, squares(params))
    report = jax.jit(si_jax.diagnose)(optimizer.opt_state, shifted(params))
    assert list(report.penalty) == ["bias", "kernel"]
    expected = 0.5 * 0.25 * jnp.square(params["kernel"][...]).sum()
    np.testing.assert_allclose(report.penalty["kernel"], expected, rtol=1e-5)
    optimizer.update(model, params)


@forms
def test_bad_importances_are_named(form):
    tx, params = make(form), init()
    opt_state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    for wrong, message in (
        (
            ones | {"bias": jnp.array([1, -1e-9, 0])},
            r"\['bias'\] is negative.*at least 0",
        ),
        (ones | {"kernel": jnp.full((4, 3), jnp.nan)}, r"\['kernel'\] is not finite"),
        (ones | {"kernel": jnp.full((4, 3), jnp.inf)}, r"\['kernel'\] is not finite"),
        ({"bias": ones["bias"]}, r"\['kernel'\] is missing"),
        (ones | {"bias": jnp.ones(2)}, r"\['bias'\] has shape \(2,\)"),
        (ones | {"head": jnp.ones(2)}, r"\['head'\] is unknown"),
    ):
        with pytest.raises(ValueError, match="importance" + message):
            si_jax.add_importance(opt_state, wrong)
    both = optax.chain(tx, ewc.elastic_weight_consolidation(1.0)).init(params)
    for call in (si_jax.add_importance, si_jax.diagnose):
        with pytest.raises(ValueError, match=r"params\['bias'\] more than once.*part"):
            call(both, ones)
        with pytest.raises(ValueError, match="no Synaptic Intelligence and no EWC"):
            call(SGD.init(params), ones)
        call(both[1], ones)


# --- Diagnosis ------------------------------------------------------------------------


@forms
def test_a_diagnosis_adds_up(form):
    tx = make(form)
    *_, (_, params, opt_state) = train(tx, init(), tasks=2, steps=5)
    _, opt_state = tx.update(params, opt_state, params)
    params = shifted(params)
    _, opt_state = tx.update(params, opt_state, params)
    report = jax.jit(si_jax.diagnose)(opt_state, params)
    memory = si_jax.synapses(opt_state)
    assert list(report.share) == ["bias", "kernel"]
    np.testing.assert_allclose(
        sum(report.penalty.values()),
        si_jax.surrogate_loss(opt_state, params),
        rtol=1e-6,
    )
    np.testing.assert_allclose(sum(report.share.values()), 1, rtol=1e-6)
    for name in report.share:
        omega = memory.importance[name]
        np.testing.assert_allclose(report.importance[name], omega.sum(), rtol=1e-6)
        assert report.max_importance[name] == omega.max()
        np.testing.assert_allclose(
            report.path_integral[name], memory.path_integral[name].sum(), rtol=1e-6
        )
        moved = params[name] - memory.reference[name]
        np.testing.assert_allclose(
            report.displacement[name], jnp.sqrt(jnp.mean(moved**2)), rtol=1e-6
        )


def test_a_diagnosis_before_the_first_task_has_ended_and_of_ewc():
    params = {"w": jnp.ones(2)}
    report = si_jax.diagnose(make("link").init(params), params)
    assert report.share["w"] == report.penalty["w"] == report.displacement["w"] == 0
    elastic = ewc.elastic_weight_consolidation(2.0)
    opt_state = ewc.consolidate(elastic.init(params), params, {"w": jnp.ones(2)})
    report = si_jax.diagnose(opt_state, shifted(params))
    assert report.path_integral == {}
    np.testing.assert_allclose(report.penalty["w"], 2 * 2 * 0.25)
    assert str(report).splitlines()[1].split() == ["w", "2", "1", "1", "1", "0.5"]


def test_a_diagnosis_of_several_networks():
    tx, params = make("wrapper"), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    opt_state = jax.vmap(tx.init)(params)
    opt_state = jax.vmap(si_jax.add_importance)(opt_state, params)
    report = jax.vmap(si_jax.diagnose)(opt_state, params + 1)
    np.testing.assert_allclose(report.importance["params"], [3, 7])
    np.testing.assert_allclose(report.penalty["params"], [1.5, 3.5])
    assert "Diagnosis(" in str(report)
    with pytest.raises(ValueError, match="batched"):
        si_jax.diagnose(opt_state, params)


def remarks(opt_state, params):
    """The lines below the table, which has a head, a row a leaf, and a sum."""
    report = si_jax.diagnose(opt_state, params)
    return str(report).splitlines()[len(report.share) + 2 :]


def step(tx, grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return opt_state, optax.apply_updates(params, updates)


@forms
def test_a_table_remarks_on_what_is_wrong_and_on_nothing_else(form):
    tx, params = make(form), {"a": {"w": jnp.ones(2)}, "b": jnp.ones(())}
    grads = jax.tree.map(jnp.ones_like, params)
    opt_state, now = step(tx, grads, tx.init(params), params)
    (remark,) = remarks(opt_state, now)
    assert remark.startswith("Nothing is held")
    earned = si_jax.diagnose(opt_state, now).path_integral  # of the last step, too
    np.testing.assert_allclose(earned["a/w"], (params["a"]["w"] - now["a"]["w"]).sum())

    opt_state = si_jax.consolidate(opt_state, now)
    for _ in range(3):
        opt_state, now = step(tx, grads, opt_state, now)
    assert remarks(opt_state, now) == []
    (remark,) = remarks(tx.init(now), now)  # as a trainer does at each task
    assert remark.startswith("Nothing is held")

    bad = si_jax.synapses(opt_state)
    for tree in (bad.path_integral, bad.importance):
        (where,) = (
            i for i, x in enumerate(jax.tree.leaves(opt_state)) if x is tree["a"]["w"]
        )
        for value in (jnp.nan, -jnp.inf):
            leaves, treedef = jax.tree.flatten(opt_state)
            leaves[where] = leaves[where].at[1].set(value)
            found = remarks(jax.tree.unflatten(treedef, leaves), now)
            assert found[0] == "Ω or ω is no finite number: a/w."


@pytest.mark.parametrize("how", ["scale", "rate"])
@forms
def test_a_return_that_is_maximised_shows_as_negative(form, how):
    """Up the hill, by the gradient of what is to rise: it earns nothing."""
    rising = optax.chain(optax.scale(-1.0), SGD)
    tx = make(form, rising if how == "scale" else optax.sgd(-0.05))
    params = jnp.array([1.0, 2.0])
    opt_state = tx.init(params)
    for _ in range(3):
        opt_state, params = step(tx, -params, opt_state, params)  # of −½ θ²
    assert any(line.startswith("Σω < 0") for line in remarks(opt_state, params))
    held = si_jax.synapses(si_jax.consolidate(opt_state, params)).importance
    assert not held.any()
    # With the sign of a loss it is as ever.
    tx, opt_state = make(form), make(form).init(params)
    for _ in range(3):
        opt_state, params = step(tx, params, opt_state, params)
    assert not any(line.startswith("Σω < 0") for line in remarks(opt_state, params))
    held = si_jax.synapses(si_jax.consolidate(opt_state, params)).importance
    assert held.all()


def test_rounding_outside_of_the_wrapper_shows_and_the_link_sees_it():
    """Stochastic rounding in the caller: the optimizer's own step rounds to nothing."""
    held = {}
    for form in FORMS:
        tx, params = make(form, optax.sgd(1e-4)), jnp.ones(512, jnp.bfloat16)
        opt_state = tx.init(params)
        for i in range(4):
            updates, opt_state = tx.update(params, opt_state, params)
            exact = params.astype(jnp.float32) + updates.astype(jnp.float32)
            chance = jax.random.uniform(jax.random.key(i), params.shape)
            rounded = jnp.floor(exact * 2**8 + chance) / 2**8  # bfloat16 in [½, 1]
            params = rounded.astype(params.dtype)
        remark = "Parameters moved, but earned no ω. If not by the optimizer"
        shown = [line for line in remarks(opt_state, params) if remark in line]
        assert bool(shown) == (form == "wrapper")
        opt_state = si_jax.consolidate(opt_state, params)
        held[form] = float(si_jax.synapses(opt_state).importance.sum())
    assert held["wrapper"] == 0
    assert held["link"] > 0


def test_sum_of_omega_is_the_fall_of_the_loss_or_that_times_the_devices():
    tx = si_jax.with_synaptic_intelligence(OPTIMIZERS["adam"])
    for devices in (1, 8):
        params, opt_state = START, tx.init(START)
        for _ in range(30):
            grads = devices * HESSIAN * params  # summed where a mean was meant
            opt_state, params = step(tx, grads, opt_state, params)
        fall = (HESSIAN * (START**2 - params**2)).sum() / 2
        report = si_jax.diagnose(opt_state, params)
        ratio = report.path_integral["params"] / fall
        np.testing.assert_allclose(ratio, devices, rtol=0.03)


# --- The unbiased path integral -------------------------------------------------------

HESSIAN, START = jnp.array([1.0, 4.0]), jnp.array([1.0, 0.5])


def earned(unbiased, noise, rate, steps, runs=1):
    """Σω less the drop of the loss ½ Σ H θ², and ½ Σ Δθ H Δθ, over noisy descents."""
    link = si_jax.synaptic_intelligence(0.0, unbiased=unbiased)
    tx = optax.chain(link, optax.sgd(rate))

    def noisy(params, key):
        return HESSIAN * params + noise * jax.random.normal(key, (2,))

    @jax.jit
    @jax.vmap
    def run(key):
        def step(carry, key):
            params, opt_state = carry
            updates, opt_state = tx.update(noisy(params, key), opt_state, params)
            return (params + updates, opt_state), (HESSIAN * updates**2).sum() / 2

        keys = jax.random.split(key, steps + 1)
        carry = START, tx.init(START)
        (params, opt_state), curved = jax.lax.scan(step, carry, keys[1:])
        # One more gradient closes the last interval.
        _, opt_state = tx.update(noisy(params, keys[0]), opt_state, params)
        drop = (HESSIAN * (START**2 - params**2)).sum() / 2
        return si_jax.synapses(opt_state).path_integral.sum() - drop, curved.sum()

    return map(np.asarray, run(jax.random.split(jax.random.key(0), runs)))


def test_unbiased_path_integral_follows_the_loss_through_noise():
    """But for what the loss bends within a step, which goes to 0 with the step."""
    noise, rate, steps, runs = 1.0, 0.01, 100, 2000
    excess = float(theory.noise_path_integral([noise**2] * 2, rate * steps).sum())
    for unbiased, sign, expected in ((True, 1, 0.0), (False, -1, excess)):
        error, curved = earned(unbiased, noise, rate, steps, runs)
        error = error + sign * curved
        sem = error.std(ddof=1) / np.sqrt(runs)
        assert abs(error.mean() - expected) < 3 * sem
        assert excess > 100 * sem
        assert curved.mean() < 0.05 * excess


def test_both_rules_agree_without_noise_as_the_step_goes_to_zero():
    """One takes the gradient before the step, the other the one after it."""
    for unbiased, sign in ((True, -1), (False, 1)):
        for rate in (0.02, 0.01):
            (error,), (curved,) = earned(unbiased, 0.0, rate, 100)
            np.testing.assert_allclose(error, sign * curved, rtol=1e-3)
            assert 0 < curved < 2 * rate


def test_what_moves_between_tasks_earns_nothing():
    """A head that starts anew after consolidation has not learned by that."""
    tx = make("link", unbiased=True)
    params = jnp.ones(3)
    opt_state = tx.init(params)
    for _ in range(2):
        params, opt_state = params + 1, si_jax.consolidate(opt_state, params)
        _, opt_state = tx.update(jnp.ones(3), opt_state, params)
        assert not si_jax.synapses(opt_state).path_integral.any()
    _, opt_state = tx.update(2 * jnp.ones(3), opt_state, params + 1)
    np.testing.assert_array_equal(si_jax.synapses(opt_state).path_integral, -2.0)


def test_the_last_step_of_a_task_and_one_before_no_number_take_their_own_gradient():
    tx = make("link", unbiased=True)
    opt_state = tx.init(jnp.zeros(2))
    _, opt_state = tx.update(jnp.full(2, -3.0), opt_state, jnp.zeros(2))
    bad = jnp.array([jnp.nan, -2.0])
    _, after = tx.update(bad, opt_state, jnp.ones(2))
    np.testing.assert_array_equal(si_jax.synapses(after).path_integral, [3.0, 2.0])
    after = si_jax.consolidate(opt_state, jnp.ones(2))
    np.testing.assert_allclose(si_jax.synapses(after).importance, 3 / 1.01, rtol=1e-6)


# --- States and parameters of other kinds ---------------------------------------------


@forms
def test_complex_parameters_split_by_optax(form):
    """As if the real and the imaginary part were two parameters."""
    tx = lenient(contrib.split_real_and_imaginary(make(form)))
    pair = make(form)
    params = {"lam": jnp.array([1 + 2j, 3 - 1j]), "w": jnp.ones(2)}
    grads = {"lam": jnp.array([1 - 1j, 0.5j]), "w": jnp.ones(2)}

    def apart(tree):
        lam = tree["lam"]
        return {"lam": {"re": lam.real, "im": lam.imag}, "w": tree["w"]}

    opt_state, expected = tx.init(params), pair.init(apart(params))
    more = {"lam": jnp.array([1 + 2j, 3 + 4j]), "w": jnp.ones(2)}
    opt_state = si_jax.add_importance(opt_state, more)
    expected = si_jax.add_importance(expected, apart(more))
    for _ in range(2):
        updates, opt_state = tx.update(grads, opt_state, params)
        _, expected = pair.update(apart(grads), expected, apart(params))
        params = optax.apply_updates(params, updates)
        opt_state = si_jax.consolidate(opt_state, params)
        expected = si_jax.consolidate(expected, apart(params))
    opt_state = si_jax.reset_optimizer(tx, opt_state, params)
    opt_state = si_jax.carry_over(opt_state, into=tx.init(params))
    params = shifted(params)
    np.testing.assert_allclose(
        si_jax.surrogate_loss(opt_state, params),
        si_jax.surrogate_loss(expected, apart(params)),
        rtol=1e-6,
    )
    report = si_jax.diagnose(opt_state, params)
    assert list(report.share) == ["lam/real", "lam/imaginary", "w"]
    wanted = si_jax.diagnose(expected, apart(params))
    np.testing.assert_allclose(
        report.penalty["lam/imaginary"], wanted.penalty["lam/im"], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"lam'\] is complex64.*split_real_and_im"):
        pair.init(params)


@forms
def test_a_state_restored_without_a_target_is_told_apart(form, tmp_path):
    tx, params = make(form, OPTIMIZERS["adam"]), init()
    opt_state = tx.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
    with ocp.StandardCheckpointer() as checkpointer:
        from_orbax = checkpointer.restore(tmp_path / "state")
    from_flax = serialization.msgpack_restore(serialization.to_bytes(opt_state))
    for restored in (from_orbax, from_flax):
        for call in (
            lambda s: si_jax.consolidate(s, params),
            lambda s: si_jax.surrogate_loss(s, params),
            lambda s: si_jax.carry_over(s, into=opt_state),
            lambda s: ewc.consolidate(s, params, params),
            si_jax.synapses,
        ):
            with pytest.raises(ValueError, match=r"restore it into tx\.init\(params\)"):
                call(restored)
