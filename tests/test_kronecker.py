"""Kronecker-factored consolidation, against exact quadratics and plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from problem import init, lenient

import si_jax
from si_jax import ewc, importance, kronecker
from si_jax.kronecker import Factors, Layer

NAMES = "['kernel']", "['bias']"


def logits(params, x):
    return x @ params["kernel"] + params["bias"]


def made_up(seed, rank=2):
    """Factors of the problem's layer, of as many outer products."""
    rng = np.random.default_rng(seed)
    a, g = rng.normal(0.3, 1, (rank, 4)), rng.normal(size=(rank, 3))
    return Factors(
        {
            NAMES[0]: Layer(
                jnp.asarray((a.T @ a / rank).reshape(4, 1, 4, 1), jnp.float32),
                jnp.asarray((g.T @ g).reshape(1, 3, 1, 3), jnp.float32),
                {NAMES[1]: jnp.asarray(a.mean(0).reshape(4, 1), jnp.float32)},
                jnp.ones((), jnp.float32),
            )
        },
        {},
    )


def homogeneous(factors):
    """A with the bias's row last, and G, in float64."""
    layer = factors.layers[NAMES[0]]
    a = np.asarray(layer.inputs, np.float64).reshape(4, 4)
    (mean,) = layer.bias.values()
    mean = np.asarray(mean, np.float64).ravel()
    return (
        np.block([[a, mean[:, None]], [mean[None], float(layer.tasks)]]),
        np.asarray(layer.outputs, np.float64).reshape(3, 3),
    )


def stacked(params):
    return np.concatenate(
        [np.asarray(params["kernel"]), np.asarray(params["bias"])[None]]
    ).astype(np.float64)


def normal(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "f4"), init())


SHAPES = jax.eval_shape(lambda: made_up(0))
LINK = kronecker.kronecker_consolidation(2.0, SHAPES)


def close(a, b, rtol=1e-5, atol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
    )


# --- The penalty ----------------------------------------------------------------------


def test_of_a_linear_gaussian_model_half_the_penalty_is_the_loss_itself():
    """‖Wᵀx + b − y‖² / 2 with A from the data and G = 1: the expansion is exact."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 1, (50, 4)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)

    def loss(p):
        return 0.5 * jnp.mean(jnp.sum((x @ p["kernel"] + p["bias"][None] - y) ** 2, -1))

    best = np.linalg.lstsq(np.c_[x, np.ones(50)], y, rcond=None)[0]
    best = {"kernel": jnp.asarray(best[:4]), "bias": jnp.asarray(best[4])}
    factors = Factors(
        {
            NAMES[0]: Layer(
                (x.T @ x / 50).reshape(4, 1, 4, 1),
                jnp.eye(3).reshape(1, 3, 1, 3),
                {NAMES[1]: x.mean(0).reshape(4, 1)},
                jnp.array(1.0),
            )
        },
        {},
    )
    tx = kronecker.kronecker_consolidation(0.5, factors)
    state = kronecker.consolidate(tx.init(best), best, factors)
    for seed in range(3):
        away = normal(seed)
        rise = loss(away) - loss(best)
        np.testing.assert_allclose(si_jax.surrogate_loss(state, away), rise, rtol=1e-4)
        pulled, _ = tx.update(jax.tree.map(jnp.zeros_like, away), state, away)
        close(pulled, jax.grad(loss)(away), rtol=1e-4, atol=1e-4)


def test_with_diagonal_factors_it_is_ewc():
    a, g = jnp.array([1.0, 2.0, 0.0, 3.0]), jnp.array([0.5, 1.0, 2.0])
    factors = Factors(
        {
            NAMES[0]: Layer(
                jnp.diag(a).reshape(4, 1, 4, 1),
                jnp.diag(g).reshape(1, 3, 1, 3),
                {NAMES[1]: jnp.zeros((4, 1))},
                jnp.array(1.0),
            )
        },
        {},
    )
    ours = kronecker.kronecker_consolidation(0.7, factors)
    theirs = ewc.elastic_weight_consolidation(0.7)
    fisher, grads, away = {"kernel": jnp.outer(a, g), "bias": g}, normal(1), normal(2)
    state = kronecker.consolidate(ours.init(init()), init(), factors)
    elastic = ewc.consolidate(theirs.init(init()), init(), fisher)
    close(ours.update(grads, state, away)[0], theirs.update(grads, elastic, away)[0])
    np.testing.assert_allclose(
        si_jax.surrogate_loss(state, away),
        si_jax.surrogate_loss(elastic, away),
        rtol=1e-6,
    )


def test_penalty_of_any_layout_is_that_of_its_block():
    """Axes of inputs and outputs in any order, against the whole matrix."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 4)
    a, g = rng.normal(size=(5, 3)), rng.normal(size=(9, 8))
    a, g = a.T @ a, g.T @ g
    factors = Factors(
        {
            "": Layer(
                jnp.asarray(a, jnp.float32).reshape(1, 3, 1, 1, 3, 1),
                jnp.asarray(g, jnp.float32).reshape(2, 1, 4, 2, 1, 4),
                {},
                jnp.array(1.0),
            )
        },
        {},
    )
    delta = rng.normal(size=shape)
    flat = delta.transpose(1, 0, 2).ravel()
    tx = kronecker.kronecker_consolidation(1.0, factors)
    zero = jnp.zeros(shape)
    state = kronecker.consolidate(tx.init(zero), zero, factors)
    away = jnp.asarray(delta, jnp.float32)
    penalty = si_jax.surrogate_loss(state, away)
    np.testing.assert_allclose(penalty, flat @ np.kron(a, g) @ flat, rtol=1e-5)
    pulled = 2 * (np.kron(a, g) @ flat).reshape(3, 2, 4).transpose(1, 0, 2)
    close(tx.update(zero, state, away)[0], pulled, rtol=1e-4, atol=1e-4)


# --- Several tasks --------------------------------------------------------------------


def merged(*factors):
    tx = kronecker.kronecker_consolidation(1.0, factors[0])
    state = tx.init(init())
    for one in factors:
        state = kronecker.consolidate(state, init(), one)
    return np.kron(*homogeneous(state.factors)), sum(
        np.kron(*homogeneous(one)) for one in factors
    )


def test_equal_tasks_are_merged_exactly():
    ours, exact = merged(*[made_up(1)] * 4)
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_one_shared_factor_is_merged_exactly():
    first, second = made_up(1), made_up(2)
    shared = first.layers[NAMES[0]].outputs
    layer = second.layers[NAMES[0]]._replace(outputs=shared)
    ours, exact = merged(first, Factors({NAMES[0]: layer}, {}))
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_merged_pair_holds_at_least_a_share_of_the_exact_sum(tasks):
    """Σ A ⊗ Σ G / T − Σ (A ⊗ G) / T is positive semidefinite; and it is not far off."""
    ours, exact = merged(*(made_up(i, rank=20) for i in range(tasks)))
    lowest = np.linalg.eigvalsh(ours - exact / tasks).min()
    assert lowest > -1e-5 * np.linalg.norm(exact)
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    diagonal = np.linalg.norm(np.diag(np.diag(exact)) - exact) / np.linalg.norm(exact)
    assert error < 0.25 < diagonal


def test_what_the_nearest_pair_would_forget_is_held():
    """Two tasks that need different directions: the nearest pair drops the smaller."""

    def one_direction(i, j, size):
        a, g = np.zeros((4, 4), "f4"), np.zeros((3, 3), "f4")
        a[i, i], g[j, j] = size, size
        return (
            made_up(0)
            .layers[NAMES[0]]
            ._replace(
                inputs=jnp.asarray(a).reshape(4, 1, 4, 1),
                outputs=jnp.asarray(g).reshape(1, 3, 1, 3),
                bias={NAMES[1]: jnp.zeros((4, 1))},
            )
        )

    tasks = [Factors({NAMES[0]: one_direction(i, i, 2.0 - i)}, {}) for i in range(2)]
    blocks = [np.kron(a[:4, :4], g) for a, g in map(homogeneous, tasks)]
    exact = sum(blocks)
    rearranged = exact.reshape(4, 3, 4, 3).transpose(0, 2, 1, 3).reshape(16, 9)
    u, s, v = np.linalg.svd(rearranged)
    nearest = np.kron((u[:, 0] * s[0]).reshape(4, 4), v[0].reshape(3, 3))
    second = np.argmax(np.diag(blocks[1]))
    assert abs(nearest[second, second]) < 1e-6
    ours, _ = merged(*tasks)
    ours = ours[: len(exact), : len(exact)]
    assert ours[second, second] >= exact[second, second] / 2


def test_two_tasks_are_those_of_plain_numpy():
    """SGD with the pull written out, factors from softmax, in float64."""
    rng = np.random.default_rng(0)
    data = [(rng.normal(0.2, 1, (40, 4)), rng.integers(0, 3, 40)) for _ in range(3)]
    c, rate = 0.3, 0.1

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    w = ref = stacked(init())
    a_sum, g_sum = np.zeros((5, 5)), np.zeros((3, 3))
    for t, (x, y) in enumerate(data):
        x1 = np.c_[x, np.ones(40)]
        for _ in range(20):
            grad = x1.T @ (softmax(x1 @ w) - np.eye(3)[y]) / 40
            pull = 2 * c * a_sum @ (w - ref) @ g_sum / max(t, 1)
            w = w - rate * (grad + pull)
        p = softmax(x1 @ w)
        a_sum = a_sum + x1.T @ x1 / 40
        g_sum = g_sum + np.diag(p.mean(0)) - p.T @ p / 40
        ref = w

    def measure(params, x):
        return importance.kronecker(logits, params, x, exact=True)

    x = jnp.asarray(data[0][0], jnp.float32)
    shapes = jax.eval_shape(measure, init(), x)
    tx = optax.chain(kronecker.kronecker_consolidation(c, shapes), optax.sgd(rate))

    def task(carry, data):
        x, y = data

        def loss(p):
            out = x @ p["kernel"] + p["bias"][None]
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, carry, length=20)
        state = kronecker.consolidate(state, params, measure(params, x))
        return (params, state), None

    xs = jnp.asarray([x for x, _ in data], jnp.float32)
    ys = jnp.asarray([y for _, y in data], jnp.int32)
    (params, state), _ = jax.jit(functools.partial(jax.lax.scan, task))(
        (init(), tx.init(init())), (xs, ys)
    )
    np.testing.assert_allclose(stacked(params), w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(homogeneous(state[0].factors)[0], a_sum, rtol=1e-4)
    np.testing.assert_allclose(
        homogeneous(state[0].factors)[1], g_sum / 3, rtol=1e-4, atol=1e-6
    )


def test_off_and_before_the_first_task_it_is_the_plain_optimizer():
    plain = optax.sgd(0.1)
    for strength, tasks in ((0.0, 1), (5.0, 0)):
        tx = optax.chain(kronecker.kronecker_consolidation(strength, SHAPES), plain)
        state = tx.init(init())
        for _ in range(tasks):
            state = kronecker.consolidate(state, init(), made_up(1))
        grads = normal(1)
        close(
            tx.update(grads, state, normal(2))[0],
            plain.update(grads, plain.init(init()))[0],
            rtol=0,
            atol=0,
        )


# --- In any container -----------------------------------------------------------------

ADAM = lenient(optax.adam(0.01))
CONTAINERS = {
    "chain": optax.chain(LINK, ADAM),
    "named_chain": optax.named_chain(("kronecker", LINK), ("adam", ADAM)),
    "multi_steps": optax.MultiSteps(optax.chain(LINK, ADAM), 2),
    "masked bias": optax.chain(
        optax.masked(LINK, {"kernel": True, "bias": False}), ADAM
    ),
    "masked kernel": optax.chain(
        optax.masked(LINK, {"kernel": False, "bias": True}), ADAM
    ),
    "with SI": si_jax.with_synaptic_intelligence(optax.chain(LINK, ADAM), 0.5),
    "beside SI": optax.chain(si_jax.synaptic_intelligence(0.5), LINK, ADAM),
    "swept": optax.inject_hyperparams(kronecker.kronecker_consolidation)(
        strength=2.0, factors=SHAPES
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_wherever_it_sits_it_is_found_and_kept(name):
    tx, params = CONTAINERS[name], init()
    a, g = homogeneous(made_up(1))
    ones = np.ones((5, 3))
    if name == "masked bias":
        ones[4] = 0
    if name == "masked kernel":
        g = np.diag(np.diag(g))
        ones[:4] = 0
    expected = 2 * np.sum(ones * (a @ ones @ g))
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        update = jax.jit(tx.update)
        for seed in range(3):
            _, state = update(normal(seed), state, params)
        before = jax.tree.map(jnp.shape, state)
        after = jax.jit(kronecker.consolidate)(state, params, made_up(1))
        assert jax.tree.map(jnp.shape, after) == before
        away = jax.tree.map(lambda p: p + 1, params)
        np.testing.assert_allclose(
            si_jax.surrogate_loss(after, away), expected, rtol=1e-5
        )
        fresh = si_jax.reset_optimizer(tx, after, params)
        assert jax.tree.structure(fresh) == jax.tree.structure(after)
        np.testing.assert_allclose(
            si_jax.surrogate_loss(fresh, away), expected, rtol=1e-5
        )


def test_inside_the_wrapper_a_line_search_minimizes_loss_and_penalty():
    """Newton's point of ½‖θ‖² + c·penalty, which lbfgs alone cannot know."""
    tx = si_jax.with_synaptic_intelligence(
        optax.chain(LINK, lenient(optax.lbfgs())), strength=0.0
    )

    def loss(p):
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    params = normal(3)
    state = kronecker.consolidate(tx.init(params), params, made_up(1))
    start = stacked(params).ravel()
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(
            lambda p, s: tx.update(p, s, p, value=loss(p), grad=p, value_fn=loss)
        )
        for _ in range(30):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
    f = 2 * 2.0 * np.kron(*homogeneous(made_up(1)))
    best = np.linalg.solve(np.eye(15) + f, f @ start)
    np.testing.assert_allclose(stacked(params).ravel(), best, atol=1e-3)


def test_strengths_are_swept_by_vmap_and_scheduled():
    def pulled(strength):
        tx = kronecker.kronecker_consolidation(strength, SHAPES)
        state = kronecker.consolidate(tx.init(init()), init(), made_up(1))
        return tx.update(jax.tree.map(jnp.zeros_like, init()), state, normal(1))[0]

    both = jax.vmap(pulled)(jnp.array([1.0, 2.0]))
    close(jax.tree.map(lambda x: 2 * x[0], both), jax.tree.map(lambda x: x[1], both))
    tx = optax.inject_hyperparams(kronecker.kronecker_consolidation)(
        strength=lambda count: 1.0 + count, factors=SHAPES
    )
    with jax.numpy_dtype_promotion("standard"):
        state = kronecker.consolidate(tx.init(init()), init(), made_up(1))
        for i in range(2):
            updates, state = tx.update(
                jax.tree.map(jnp.zeros_like, init()), state, normal(1)
            )
            close(updates, jax.tree.map(lambda x, i=i: x[i], both))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_stable(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = init(dtype)

        def step(carry, _):
            params, state = carry
            updates, state = LINK.update(params, state, params)
            state = kronecker.consolidate(state, params, made_up(1))
            return (optax.apply_updates(params, updates), state), updates

        before = jax.eval_shape(LINK.init, params)
        (_, after), updates = jax.eval_shape(
            functools.partial(jax.lax.scan, step, length=2), (params, before)
        )
        kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (before, after)]
        assert kinds[0] == kinds[1]
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        wide = "float64" if dtype == "float64" else "float32"
        assert after.reference["kernel"].dtype == wide


def test_nothing_is_shared_so_that_all_can_be_donated():
    factors, params = made_up(1), init()
    state = kronecker.consolidate(LINK.init(params), params, factors)
    everything = jax.tree.leaves((state, params, factors))
    pointers = [x.unsafe_buffer_pointer() for x in everything]
    assert len(set(pointers)) == len(pointers)


def test_sharded_parameters_train_as_unsharded_ones():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    params = init()
    state = kronecker.consolidate(LINK.init(params), params, made_up(1))
    placement = optax.tree.map_params(
        LINK,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    assert placement.reference == shardings
    away, update = normal(1), jax.jit(LINK.update)
    expected, _ = update(normal(2), state, away)
    placed = jax.device_put((normal(2), away), (shardings, shardings))
    actual, _ = update(placed[0], jax.device_put(state, placement), placed[1])
    close(actual, expected)


def test_in_an_nnx_optimizer_it_is_consolidated_in_place():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def measure(p):
        return importance.kronecker(
            lambda p, x: nnx.merge(graph, p)(x), p, jnp.eye(4), exact=True
        )

    factors = measure(params)
    tx = kronecker.kronecker_consolidation(2.0, factors)
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    state = kronecker.consolidate(optimizer.opt_state, params, factors)
    nnx.update(optimizer.opt_state, nnx.state(state))
    away = jax.tree.map(lambda p: jnp.arange(p.size * 1.0).reshape(p.shape), params)
    plain = kronecker.consolidate(tx.init(params), params, factors)
    expected = si_jax.surrogate_loss(plain, away)
    zero = jax.tree.map(jnp.zeros_like, params)
    pulled = jax.tree.map(lambda x: -0.1 * x, tx.update(zero, plain, away)[0])
    assert expected > 0.1
    found = si_jax.surrogate_loss(optimizer.opt_state, away)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    fresh = si_jax.reset_optimizer(optimizer.tx, optimizer.opt_state, params)
    np.testing.assert_allclose(si_jax.surrogate_loss(fresh, away), expected, rtol=1e-6)
    nnx.update(model, away)
    optimizer.update(model, zero)
    after = nnx.state(model, nnx.Param)
    close(after, jax.tree.map(jnp.add, away, pulled), rtol=1e-4, atol=1e-4)


def test_checkpointed_by_orbax(tmp_path):
    state = kronecker.consolidate(LINK.init(init()), init(), made_up(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(LINK.init, init())
        restored = checkpointer.restore(tmp_path / "state", target)
    close(restored, state, rtol=0, atol=0)


def test_exported():
    pytest.importorskip("flatbuffers")
    state = kronecker.consolidate(LINK.init(init()), init(), made_up(1))
    exported = jax.export.export(jax.jit(LINK.update))(normal(1), state, normal(2))
    again = jax.export.deserialize(exported.serialize())
    close(
        again.call(normal(1), state, normal(2)),
        LINK.update(normal(1), state, normal(2)),
    )


# --- Carried over ---------------------------------------------------------------------


def test_new_classes_and_inputs_are_free_and_the_old_ones_held():
    state = kronecker.consolidate(LINK.init(init()), init(), made_up(1))
    grown = {"kernel": jnp.zeros((6, 5)), "bias": jnp.zeros(5)}
    grown = jax.tree.map(
        lambda new, old: new.at[tuple(map(slice, old.shape))].set(old), grown, init()
    )
    x = jnp.ones((2, 6))
    shapes = jax.eval_shape(
        lambda p: importance.kronecker(logits, p, x, exact=True), grown
    )
    tx = optax.chain(kronecker.kronecker_consolidation(2.0, shapes), optax.sgd(0.1))
    carried = si_jax.carry_over(state, into=tx.init(grown))
    old = normal(1)
    moved = {
        "kernel": jnp.full((6, 5), 7.0).at[:4, :3].set(old["kernel"]),
        "bias": jnp.full(5, 7.0).at[:3].set(old["bias"]),
    }
    np.testing.assert_allclose(
        si_jax.surrogate_loss(carried, moved),
        si_jax.surrogate_loss(state, old),
        rtol=1e-5,
    )


def test_shrinking_is_refused_and_counts_must_agree():
    state = kronecker.consolidate(LINK.init(init()), init(), made_up(1))
    with pytest.raises(ValueError, match="0 times"):
        si_jax.carry_over(
            state, into=ewc.elastic_weight_consolidation(1.0).init(init())
        )
    same = si_jax.carry_over(state, into=LINK.init(init()))
    close(same, state)


# --- Refused --------------------------------------------------------------------------


def with_inputs(value):
    factors = made_up(1)
    layer = factors.layers[NAMES[0]]
    return Factors(
        {NAMES[0]: layer._replace(inputs=layer.inputs.at[0, 0, 0, 0].set(value))}, {}
    )


STATE = LINK.init(init())


def end(factors, state=STATE):
    return kronecker.consolidate(state, init(), factors)


WITHOUT_BIAS = Factors(
    {NAMES[0]: made_up(1).layers[NAMES[0]]._replace(bias={})}, {NAMES[1]: jnp.ones(3)}
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kronecker.kronecker_consolidation(-1.0, SHAPES), "strength"),
        (lambda: kronecker.kronecker_consolidation(1.0, init()), "must be what"),
        (lambda: LINK.init({"kernel": jnp.ones((4, 3))}), "bias"),
        (lambda: LINK.init({**init(), "scale": jnp.ones(3)}), "scale"),
        (lambda: LINK.init({**init(), "kernel": jnp.ones((5, 3))}), "do not fit"),
        (lambda: LINK.init({**init(), "n": jnp.array(1)}), "real floating-point"),
        (lambda: LINK.update(init(), STATE), "requires the current value"),
        (lambda: LINK.update(init(), STATE, init(), grad_fn=init), "grad_fn"),
        (lambda: end(init()), "A diagonal is for ewc"),
        (lambda: end(WITHOUT_BIAS), "state was made for"),
        (lambda: end(with_inputs(jnp.nan)), "not finite"),
        (lambda: end(with_inputs(-1.0)), "negative"),
        (lambda: kronecker.consolidate(STATE, {"kernel": 1.0}, made_up(1)), "params"),
        (lambda: end(made_up(1), optax.EmptyState()), "no Kronecker"),
        (lambda: si_jax.add_importance(STATE, init()), "kronecker.consolidate"),
        (lambda: si_jax.diagnose(STATE, init()), "Kronecker factors"),
        (lambda: si_jax.surrogate_loss((), init()), "kronecker_consolidation"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
