"""Adapters held by their product, against EWC of the product written out in full."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problem import lenient

import si_jax
from si_jax import ewc, importance, lora

SHAPES = {
    "deep": {"up": {"A": (5, 2), "B": (2, 3)}},
    "stack": {"A": (4, 3, 1), "B": (4, 1, 6)},
    "head": (3,),
}
NAMES = {"deep/up": (5, 3), "stack": (4, 3, 6)}
LINK = lora.product_consolidation(2.0, "A", "B")
update, merged = jax.jit(LINK.update), jax.jit(lora.consolidate)
penalty_of = jax.jit(si_jax.surrogate_loss)


def normal(seed, shapes=SHAPES, dtype="f4"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def needed(seed, rank=2):
    """F of a rank, at least 0."""
    rng = np.random.default_rng(seed)

    def of(shape):
        rows = rng.uniform(size=(*shape[:-1], rank))
        return (rows @ rng.uniform(size=(*shape[:-2], rank, shape[-1]))).astype("f4")

    return {name: of(shape) for name, shape in NAMES.items()}


def products(params):
    pairs = {"deep/up": params["deep"]["up"], "stack": params["stack"]}
    return {name: pair["A"] @ pair["B"] for name, pair in pairs.items()}


def thin(f):
    """The product of F's sums by its total."""
    rows, columns = f.sum(-1, keepdims=True), f.sum(-2, keepdims=True)
    return rows * columns / rows.sum(-2, keepdims=True)


def close(a, b, rtol=1e-5, atol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


def zero():
    return jax.tree.map(jnp.zeros_like, normal(0))


# --- The penalty ----------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2])
def test_it_is_ewc_of_the_product_whose_importance_has_these_sums(tasks):
    state, theta = LINK.init(normal(0)), normal(0)
    total = {name: np.zeros(shape) for name, shape in NAMES.items()}
    for task in range(tasks):
        theta = normal(10 + task)
        state = merged(state, theta, needed(task))
        total = jax.tree.map(np.add, total, needed(task))
    in_full = ewc.elastic_weight_consolidation(2.0).init(products(theta))
    in_full = si_jax.add_importance(in_full, jax.tree.map(thin, total))

    def penalty(params):
        return penalty_of(in_full, products(params))

    away, grads = normal(2), normal(3)
    close(penalty_of(state, away), penalty(away), rtol=1e-5)
    pulled = jax.tree.map(jnp.add, grads, jax.grad(penalty)(away))
    close(update(grads, state, away)[0], pulled, rtol=1e-4, atol=1e-3)
    assert penalty(away) > 10


def test_an_importance_of_rank_one_is_kept_whole():
    f = needed(0, rank=1)
    close(jax.tree.map(thin, f), f)


def test_factors_that_make_the_same_product_are_free():
    theta = normal(1)
    state = merged(LINK.init(theta), theta, needed(0))
    turn = jnp.array([[1.0, 2.0], [-1.0, 3.0]])
    up = theta["deep"]["up"]
    same = {
        "deep": {"up": {"A": up["A"] @ turn, "B": jnp.linalg.inv(turn) @ up["B"]}},
        "stack": {"A": -theta["stack"]["A"], "B": -theta["stack"]["B"]},
        "head": theta["head"] + 5,  # is in no adapter
    }
    close(penalty_of(state, same), 0.0, atol=1e-4)
    close(update(zero(), state, same)[0], zero(), atol=1e-4)


def test_a_small_move_of_large_adapters_has_its_penalty():
    """A difference of the two products' own sums would be noise here."""
    theta = jax.tree.map(lambda x: 100 * x, normal(1))
    state = merged(LINK.init(theta), theta, needed(0))
    away = jax.tree.map(lambda x, y: x + 1e-3 * y, theta, normal(2))
    moved = jax.tree.map(
        lambda x, y: x - y,
        *(products(jax.tree.map(np.float64, p)) for p in (away, theta)),
    )
    terms = [thin(f) * np.square(moved[name]) for name, f in needed(0).items()]
    expected = 2.0 * sum(x.sum() for x in terms)
    np.testing.assert_allclose(penalty_of(state, away), expected, rtol=1e-3)


def test_at_the_first_b_the_factors_importance_holds_no_a_but_the_products_does():
    """Both from the same examples, of a linear model with a unit Gaussian output."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)), jnp.float32)
    base = jnp.zeros((4, 3))
    first = {"A": jnp.ones((4, 2)), "B": jnp.zeros((2, 3))}

    def information(of_params, params):
        def log_likelihood(params, example):
            x, noise = example
            out = x @ of_params(params)
            target = jax.lax.stop_gradient(out) + noise
            return -jnp.sum((target - out) ** 2) / 2

        noise = jax.random.normal(jax.random.key(0), (20, 3))
        return importance.empirical_fisher(log_likelihood, params, (x, noise))

    apart = information(lambda p: base + p["A"] @ p["B"], first)
    assert not apart["A"].any()
    whole = information(lambda w: w, base)
    state = LINK.init(first)
    state = merged(state, first, {"": whole})
    moved = {"A": first["A"], "B": jnp.ones((2, 3))}
    (zeros,) = [jax.tree.map(jnp.zeros_like, first)]
    pull = update(zeros, state, moved)[0]
    assert (pull["A"] > 0).all()


def test_off_and_before_the_first_task_it_is_the_plain_optimizer():
    for strength, tasks in ((0.0, 1), (5.0, 0)):
        link = lora.product_consolidation(strength, "A", "B")
        state = link.init(normal(0))
        for _ in range(tasks):
            state = merged(state, normal(0), needed(0))
        grads = normal(1)
        close(jax.jit(link.update)(grads, state, normal(2))[0], grads, rtol=0, atol=0)


def test_it_is_as_thin_as_the_adapters():
    params = {"A": jnp.zeros((1000, 2)), "B": jnp.zeros((2, 500))}
    state = LINK.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 1500 + 1500 + 1
    compiled = update.lower(params, state, params).compile()
    if memory := compiled.memory_analysis():
        assert memory.temp_size_in_bytes < 4 * 1000 * 500 / 4


# --- In any container -----------------------------------------------------------------

ADAM = lenient(optax.adam(0.01))
CONTAINERS = {
    "chain": optax.chain(LINK, ADAM),
    "multi_steps": optax.MultiSteps(optax.chain(LINK, ADAM), 2),
    "masked head": optax.chain(
        optax.masked(LINK, {"deep": True, "stack": True, "head": False}), ADAM
    ),
    "with SI": si_jax.with_synaptic_intelligence(optax.chain(LINK, ADAM), 0.5),
    "beside SI": optax.chain(si_jax.synaptic_intelligence(0.5), LINK, ADAM),
    "swept": optax.inject_hyperparams(lora.product_consolidation)(
        strength=2.0, left="A", right="B"
    ),
}


def expected_penalty(theta, away, f):
    moved = jax.tree.map(jnp.subtract, products(away), products(theta))
    return 2.0 * sum(jnp.sum(thin(f[name]) * x**2) for name, x in moved.items())


@pytest.mark.parametrize("name", CONTAINERS)
def test_wherever_it_sits_it_is_found_and_kept(name):
    tx, params, away = CONTAINERS[name], normal(0), normal(1)
    expected = expected_penalty(params, away, needed(0))
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        _, state = jax.jit(tx.update)(normal(2), state, params)
        before = jax.tree.map(jnp.shape, state)
        after = merged(state, params, needed(0))
        assert jax.tree.map(jnp.shape, after) == before
        close(penalty_of(after, away), expected)
        fresh = si_jax.reset_optimizer(tx, after, params)
        assert jax.tree.structure(fresh) == jax.tree.structure(after)
        close(penalty_of(fresh, away), expected)


def test_inside_the_wrapper_a_line_search_goes_as_on_the_whole_loss():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    plain = lenient(optax.chain(optax.sgd(1.0), search))
    tx = si_jax.with_synaptic_intelligence(optax.chain(LINK, plain), strength=0.0)
    start, goal = normal(0), normal(1)

    def loss(p):
        gaps = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), p, goal)
        return sum(jax.tree.leaves(gaps))

    def whole(p):
        return loss(p) + expected_penalty(start, p, needed(0))

    def end(tx, state, of_task):
        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(of_task)(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=of_task
            )
            return optax.apply_updates(params, updates), state

        params = start
        for _ in range(4):
            params, state = step(params, state)
        return params

    with jax.numpy_dtype_promotion("standard"):
        held = merged(tx.init(start), start, needed(0))
        reached = end(tx, held, loss)
        close(reached, end(plain, plain.init(start), whole), rtol=1e-3, atol=1e-3)
        assert whole(reached) < whole(start) - 10


def test_strengths_are_swept_by_vmap():
    def pulled(strength):
        link = lora.product_consolidation(strength, "A", "B")
        state = merged(link.init(normal(0)), normal(0), needed(0))
        return link.update(zero(), state, normal(1))[0]

    both = jax.jit(jax.vmap(pulled))(jnp.array([1.0, 2.0]))
    close(jax.tree.map(lambda x: 2 * x[0], both), jax.tree.map(lambda x: x[1], both))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_are_stable(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = normal(0, dtype=dtype)

        def step(carry, _):
            params, state = carry
            updates, state = LINK.update(params, state, params)
            state = merged(state, params, needed(0))
            return (optax.apply_updates(params, updates), state), updates

        before = jax.eval_shape(LINK.init, params)
        (_, after), updates = jax.eval_shape(
            functools.partial(jax.lax.scan, step, length=2), (params, before)
        )
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (before, after)]
        assert kinds[0] == kinds[1]
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        wide = "float64" if dtype == "float64" else "float32"
        assert {x.dtype for x in jax.tree.leaves(after.reference)} == {jnp.dtype(wide)}


def test_nothing_is_shared_so_that_all_can_be_donated():
    params, f = normal(0), jax.tree.map(jnp.asarray, needed(0))
    state = merged(LINK.init(params), params, f)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, params, f))]
    assert len(set(pointers)) == len(pointers)


def test_in_an_nnx_optimizer_it_is_consolidated_in_place():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)

    model = Net(nnx.Rngs(0))
    link = lora.product_consolidation(2.0)
    tx = optax.chain(link, optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    params = nnx.state(model, nnx.LoRAParam)
    f = {"body/lora": needed(0)["deep/up"][:4]}
    state = merged(optimizer.opt_state, params, f)
    nnx.update(optimizer.opt_state, nnx.state(state))
    away = jax.tree.map(lambda p: jnp.arange(p.size * 1.0).reshape(p.shape), params)
    plain = merged(link.init(params), params, f)
    expected = penalty_of(plain, away)
    assert expected > 0.1
    close(penalty_of(optimizer.opt_state, away), expected)
    fresh = si_jax.reset_optimizer(optimizer.tx, optimizer.opt_state, params)
    close(penalty_of(fresh, away), expected)
    still = jax.tree.map(jnp.zeros_like, params)
    pulled = jax.tree.map(lambda x: -0.1 * x, link.update(still, plain, away)[0])
    nnx.update(model, away)
    optimizer.update(model, still)
    close(nnx.state(model, nnx.LoRAParam), jax.tree.map(jnp.add, away, pulled), 1e-4)


def test_checkpointed_by_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    state = merged(LINK.init(normal(0)), normal(0), needed(0))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(LINK.init, normal(0))
        restored = checkpointer.restore(tmp_path / "state", target)
    close(restored, state, rtol=0, atol=0)


def test_exported():
    pytest.importorskip("flatbuffers")
    state = merged(LINK.init(normal(0)), normal(0), needed(0))
    exported = jax.export.export(update)(normal(1), state, normal(2))
    again = jax.export.deserialize(exported.serialize())
    close(
        again.call(normal(1), state, normal(2)),
        update(normal(1), state, normal(2)),
    )


def test_more_rank_and_new_adapters_are_carried_over_and_the_old_product_is_held():
    state = merged(LINK.init(normal(0)), normal(0), needed(0))
    grown = normal(5, {**SHAPES, "new": {"A": (2, 1), "B": (1, 2)}})
    a, b = (np.zeros(shape, "f4") for shape in ((5, 4), (4, 3)))
    a[:, 2:] = 7.0  # with rows of B at zero
    grown["deep"]["up"] = {"A": jnp.asarray(a), "B": jnp.asarray(b)}
    carried = si_jax.carry_over(state, into=optax.chain(LINK, ADAM).init(grown))
    moved = normal(6, {**SHAPES, "new": {"A": (2, 1), "B": (1, 2)}})
    old = {name: moved[name] for name in SHAPES}
    a[:, :2], b[:2] = moved["deep"]["up"]["A"], moved["deep"]["up"]["B"]
    moved["deep"] = {"up": {"A": jnp.asarray(a), "B": jnp.asarray(b)}}
    close(penalty_of(carried, moved), penalty_of(state, old))


# --- Refused --------------------------------------------------------------------------

STATE, ONE = LINK.init(normal(0)), jnp.ones((1, 1))
PAIR = {"A": ONE, "B": ONE}


def end(f, state=STATE):
    return lora.consolidate(state, normal(0), f)


def init(**params):
    return LINK.init({name: jnp.ones(shape) for name, shape in params.items()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora.product_consolidation(-1.0), "strength"),
        (lambda: lora.product_consolidation(1.0).init(normal(0)), "there are none"),
        (lambda: init(A=(3, 2)), "in params one is alone"),
        (lambda: init(x_A=(3, 2), y_B=(2, 3)), "in x one is alone"),
        (lambda: init(A=(2, 3), B=(4, 2)), r"\(2, 3\) .* exchange left and right"),
        (lambda: init(A=(3,), B=(3, 2)), "no adapter"),
        (lambda: lora.product_consolidation(1.0, "A", "A"), "both are A"),
        (lambda: LINK.init({"x": PAIR, "x_A": ONE, "x_B": ONE}), "rename"),
        (lambda: LINK.init({"A": jnp.ones((3, 2), int)}), "real floating-point"),
        (lambda: LINK.update(normal(0), STATE), "requires the current value"),
        (lambda: LINK.update(normal(0), STATE, normal(0), grad_fn=init), "grad_fn"),
        (lambda: LINK.update({}, STATE, normal(0)), "updates.* is missing"),
        (lambda: end(normal(0)), "by the adapter's name, .'deep/up', 'stack'.; got"),
        (lambda: end(jnp.ones(3)), "must be a dict"),
        (lambda: end({**needed(0), "stack": jnp.ones((3, 6))}), r"A B is \(4, 3, 6\)"),
        (lambda: end({**needed(0), "deep/up": -jnp.ones((5, 3))}), "negative"),
        (lambda: end(jax.tree.map(lambda f: f * np.nan, needed(0))), "not finite"),
        (lambda: lora.consolidate(STATE, {"head": 1.0}, needed(0)), "params"),
        (lambda: end(needed(0), optax.EmptyState()), "no products of adapters"),
        (lambda: si_jax.add_importance(STATE, normal(0)), "lora.consolidate"),
        (lambda: si_jax.diagnose(STATE, normal(0)), "products of adapters"),
        (lambda: si_jax.surrogate_loss((), normal(0)), "lora.product_consolidation"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_may_end_with_what_a_and_b_are_called():
    params = {"block": {"q_lora_a": jnp.ones((3, 1)), "q_lora_b": jnp.ones((1, 2))}}
    state = lora.product_consolidation(1.0).init(params)
    assert list(state.pairs) == ["block/q"]
