"""What the transformation promises, and what it refuses."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from problem import FORMS, OPTIMIZERS, grad, init, lenient, train

import si_jax


def leaves(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def plain(optimizer, tasks):
    return train(optimizer, init(), tasks=tasks, boundary=lambda _tx, s, _params: s)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_strength_zero_is_the_plain_optimizer(form, optimizer):
    inner = OPTIMIZERS[optimizer]
    with_si = train(FORMS[form](inner, 0.0, 0.1), init())
    for (_, p, _), (_, q, _) in zip(with_si, plain(inner, 3), strict=True):
        np.testing.assert_allclose(leaves(p), leaves(q), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_first_task_is_the_plain_optimizer_and_the_second_is_not(form, optimizer):
    inner = OPTIMIZERS[optimizer]
    (_, p1, s1), (_, p2, _) = train(FORMS[form](inner, 1.0, 0.01), init(), tasks=2)
    (_, q1, _), (_, q2, _) = plain(inner, 2)
    np.testing.assert_allclose(leaves(p1), leaves(q1), rtol=1e-6, atol=1e-7)
    assert np.abs(leaves(p2) - leaves(q2)).max() > 1e-3
    assert leaves(si_jax.synapses(s1).importance).max() > 0
    assert si_jax.surrogate_loss(s1, p1) == 0
    assert si_jax.surrogate_loss(s1, p2) > 0


@pytest.mark.parametrize("form", FORMS)
def test_pull_is_the_gradient_of_the_surrogate_loss(form):
    tx = FORMS[form](optax.sgd(1.0), 0.7, 0.01)
    *_, (_, params, opt_state) = train(tx, init(), tasks=2, steps=5)
    params = jax.tree.map(lambda x: x + 0.1, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, opt_state, params)
    expected = jax.grad(si_jax.surrogate_loss, argnums=1)(opt_state, params)
    np.testing.assert_allclose(leaves(updates), -leaves(expected), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_stronger_synapses_stay_closer(form):
    def strayed(strength):
        tx = FORMS[form](OPTIMIZERS["adam"], strength, 0.01)
        (_, first, _), (_, second, _) = train(tx, init(), tasks=2)
        return np.abs(leaves(first) - leaves(second)).mean()

    assert strayed(0.0) > strayed(0.3) > strayed(30.0)


@pytest.mark.parametrize("form", FORMS)
def test_reset_optimizer_starts_the_inner_afresh_and_keeps_the_synapses(form):
    inner = OPTIMIZERS["adam"]
    tx = FORMS[form](inner, 0.5, 0.01)
    ((_, params, opt_state),) = train(tx, init(), tasks=1)
    reset = jax.jit(lambda s, p: si_jax.reset_optimizer(tx, s, p))(opt_state, params)
    jax.tree.map(
        np.testing.assert_array_equal,
        si_jax.synapses(reset),
        si_jax.synapses(opt_state),
    )
    assert optax.tree.get(opt_state, "count") == 30
    assert optax.tree.get(reset, "count") == 0
    assert not leaves(optax.tree.get(reset, "mu")).any()
    assert jax.tree.structure(reset) == jax.tree.structure(opt_state)


@pytest.mark.parametrize("form", FORMS)
def test_reset_before_consolidation_loses_nothing(form):
    tx = FORMS[form](OPTIMIZERS["sgd"], 0.5, 0.01)

    def reset_first(tx, opt_state, params):
        opt_state = si_jax.reset_optimizer(tx, opt_state, params)
        return si_jax.consolidate(opt_state, params)

    ((_, _, after),) = train(tx, init(), tasks=1)
    ((_, _, before),) = train(tx, init(), tasks=1, boundary=reset_first)
    np.testing.assert_array_equal(
        leaves(si_jax.synapses(before).importance),
        leaves(si_jax.synapses(after).importance),
    )


@pytest.mark.parametrize("form", FORMS)
def test_consolidating_again_changes_nothing(form):
    tx = FORMS[form](OPTIMIZERS["adam"], 0.5, 0.01)
    ((_, params, once),) = train(tx, init(), tasks=1)
    jax.tree.map(np.testing.assert_array_equal, si_jax.consolidate(once, params), once)


def test_hyperparameters_are_checked_at_once():
    for make in (si_jax.synaptic_intelligence, lambda **k: FORMS["wrapper"](sgd, **k)):
        for bad in (-0.1, np.float32(-1), float("nan"), float("inf"), jnp.array(-1.0)):
            with pytest.raises(ValueError, match=r"strength .* must be >= 0"):
                make(strength=bad)
        for bad in (0, -1.0, 1e-46, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"damping .* must be > 0"):
                make(damping=bad)
        for bad in (jnp.int8, "float16", "bfloat61"):
            with pytest.raises(ValueError, match="state_dtype must be bfloat16"):
                make(state_dtype=bad)
        for bad in ("0.1", None, 0.1j):
            with pytest.raises(ValueError, match="strength must be a number, got"):
                make(strength=bad)
            with pytest.raises(ValueError, match="damping must be a number, got"):
                make(damping=bad)
        with pytest.raises(ValueError, match=r"scalar, got shape \(2,\).*vmap"):
            make(strength=jnp.ones(2))
        with pytest.raises(ValueError, match="inject_hyperparams"):
            make(damping=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="not an optimizer; to wrap one"):
        si_jax.synaptic_intelligence(sgd, 0.1)
    with pytest.raises(ValueError, match=r"inner must be an optimizer, got 0\.1"):
        si_jax.with_synaptic_intelligence(0.1, 0.1)


sgd = optax.sgd(0.1)
params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w": jnp.ones((2, 3))}, r"\['b'\] is missing"),
        ({"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, r"\['w'\] has shape \(3, 2\).*\(2"),
        ({**params, "c": jnp.ones(1)}, r"\['c'\] is unknown"),
        ([jnp.ones((2, 3)), jnp.ones(3)], r"\['b'\] is missing"),
    ],
    ids=["missing", "shape", "unknown", "container"],
)
@pytest.mark.parametrize("form", FORMS)
def test_trees_that_do_not_fit_are_named(form, wrong, message):
    tx = FORMS[form](sgd)
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match="params" + message):
        tx.update(params, opt_state, wrong)
    with pytest.raises(ValueError, match="updates" + message):
        tx.update(wrong, opt_state, params)
    with pytest.raises(ValueError, match="params" + message):
        si_jax.consolidate(opt_state, wrong)
    with pytest.raises(ValueError, match="params" + message):
        si_jax.surrogate_loss(opt_state, wrong)


def test_a_state_without_synaptic_intelligence_is_refused():
    opt_state = sgd.init(params)
    for call in (
        lambda: si_jax.consolidate(opt_state, params),
        lambda: si_jax.surrogate_loss(opt_state, params),
        lambda: si_jax.synapses(opt_state),
        lambda: si_jax.reset_optimizer(sgd, opt_state, params),
    ):
        with pytest.raises(ValueError, match="holds no Synaptic Intelligence"):
            call()


def test_synaptic_intelligence_twice_is_refused():
    tx = FORMS["wrapper"](FORMS["link"](sgd))
    with pytest.raises(ValueError, match="not both"):
        tx.init(params)


def test_reset_optimizer_refuses_another_optimizer():
    link, wrapper = (FORMS[form](sgd) for form in ("link", "wrapper"))
    with pytest.raises(ValueError, match="not made by this tx"):
        si_jax.reset_optimizer(link, wrapper.init(params), params)
    momentum = FORMS["wrapper"](optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="not made by this tx"):
        si_jax.reset_optimizer(momentum, wrapper.init(params), params)


@pytest.mark.parametrize(
    "bad", [jnp.arange(3), np.arange(3, dtype="i8"), jnp.ones(3, jnp.complex64)]
)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_must_be_real_floats(form, bad):
    with pytest.raises(ValueError, match=rf"params\['steps'\] is {bad.dtype}"):
        FORMS[form](sgd).init({"w": jnp.ones(3), "steps": bad})


class Tensor:
    """Another library's array, as far as JAX can tell."""

    shape, ndim, dtype = (3,), 1, "another.float32"

    def __array__(self, dtype=None, copy=None):
        return np.ones(3, np.float32)


@pytest.mark.parametrize("bad", [Tensor(), "name"])
@pytest.mark.parametrize("form", FORMS)
def test_what_jax_does_not_take_is_named(form, bad):
    tx, wrong = FORMS[form](sgd), {**params, "b": bad}
    opt_state = tx.init(params)
    message = r"\['b'\] is of type (Tensor|str), which JAX does not take"
    with pytest.raises(ValueError, match="params" + message):
        tx.init(wrong)
    if isinstance(bad, Tensor):
        with pytest.raises(ValueError, match="params" + message):
            tx.update(params, opt_state, wrong)
        with pytest.raises(ValueError, match="updates" + message):
            tx.update(wrong, opt_state, params)
        with pytest.raises(ValueError, match="params" + message):
            si_jax.consolidate(opt_state, wrong)


@pytest.mark.parametrize("name", ["value_fn", "grad_fn", "obj_fn"])
def test_the_link_refuses_what_it_cannot_change(name):
    tx = FORMS["link"](sgd)
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match=rf"{name} .* use si_jax.with_synaptic_intel"):
        tx.update(params, opt_state, params, **{name: jnp.sum})
    tx.update(params, opt_state, params, **{name: None}, value=1.0, grad=params)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_to_numpy_arrays_later_is_not_seen(form):
    """JAX copies them when it comes to it, which may be after the call returned."""

    def ones():
        return {"w": np.ones(1_000_000, np.float32)}

    strength, damping = np.array(0.5), np.array(1.0)
    tx = FORMS[form](optax.sgd(0.5), strength, damping)
    numpy = ones()
    opt_state = tx.init(numpy)
    numpy["w"][:], strength[...], damping[...] = 7, 7, 7
    assert (si_jax.synapses(opt_state).reference["w"] == 1).all()
    importance = ones()
    opt_state = si_jax.add_importance(opt_state, importance)
    importance["w"][:] = 7
    for _ in range(5):
        grads, now, end = ones(), ones(), ones()
        now["w"] *= 2
        updates, updated = tx.update(grads, opt_state, now)
        ended = si_jax.consolidate(updated, end)
        for tree in (grads, now, end):
            tree["w"][:] = 7
        assert (updates["w"] == -0.5 * (1 + 2 * 0.5)).all()
        assert (si_jax.synapses(ended).importance["w"] == 2).all()
        assert (si_jax.synapses(ended).reference["w"] == 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_state_keeps_its_dtypes_when_x64_is_switched_on(form):
    tx = FORMS[form](sgd)
    opt_state = tx.init(params)
    with jax.enable_x64(True):
        updated = jax.eval_shape(tx.update, params, opt_state, params)[1]
    assert jax.tree.map(lambda x: x.dtype, updated) == jax.tree.map(
        lambda x: x.dtype, opt_state
    )


SKIPPING = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("skipping", SKIPPING)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_moves_nothing_earns_nothing(form, skipping):
    """Not even one that is not a number."""
    tx = FORMS[form](SKIPPING[skipping](), 0.5, 0.1)
    params = jnp.array([1.0, 2.0])
    opt_state = tx.init(params)
    for grads in ([1.0, 1.0], [jnp.nan, 1.0], [1.0, 1.0]):
        updates, opt_state = tx.update(jnp.array(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
    opt_state = si_jax.consolidate(opt_state, params)
    importance = si_jax.synapses(opt_state).importance
    moved = params - jnp.array([1.0, 2.0])
    np.testing.assert_allclose(importance, -moved / (moved**2 + 0.1), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_state_keeps_its_dtypes_whatever_it_is_shown(form):
    narrow = {"w": jnp.ones(3, jnp.bfloat16)}
    wide = {"w": jnp.ones(3, jnp.float32)}
    tx = FORMS[form](lenient(optax.sgd(0.1)))
    opt_state = tx.init(narrow)
    dtypes = [x.dtype for x in jax.tree.leaves(opt_state)]
    _, updated = tx.update(wide, opt_state, wide)
    for state in (updated, si_jax.consolidate(updated, wide)):
        assert [x.dtype for x in jax.tree.leaves(state)] == dtypes


@pytest.mark.parametrize("form", FORMS)
def test_a_state_is_saved_and_read_by_flax_and_orbax(form, tmp_path):
    tx = FORMS[form](OPTIMIZERS["adam"], 0.5, 0.01)
    ((_, params, opt_state),) = train(tx, init(), tasks=1)
    fresh = tx.init(init())
    from_bytes = serialization.from_bytes(fresh, serialization.to_bytes(opt_state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
    with ocp.StandardCheckpointer() as checkpointer:
        from_orbax = checkpointer.restore(tmp_path / "state", fresh)
    for read in (from_bytes, from_orbax):
        jax.tree.map(np.testing.assert_array_equal, read, opt_state)
        read = jax.tree.map(jnp.asarray, read)
        tx.update(params, si_jax.consolidate(read, params), params)


def test_link_follows_parameters_changed_from_outside():
    """Whoever moved them: the path integral runs along the path of the parameters."""
    tx = FORMS["link"](lenient(optax.adam(0.01)), 0.0, 0.1)
    start = init()
    opt_state = tx.init(start)
    grads = grad(start, 0, 0)
    _, opt_state = tx.update(grads, opt_state, start)
    moved = jax.tree.map(lambda x: x + 1.0, start)  # the update is thrown away
    omega = si_jax.synapses(tx.update(grads, opt_state, moved)[1]).path_integral
    jax.tree.map(
        lambda w, g: np.testing.assert_allclose(w, -g, rtol=1e-6), omega, grads
    )


def test_importing_si_jax_loads_jax_and_optax_only():
    code = (
        "import sys, jax, optax; before = set(sys.modules); import si_jax; "
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'jax'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "{'si_jax'}", run.stderr
