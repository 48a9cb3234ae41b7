"""What optax asks of every optimizer, with both forms around or before many of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib
from problem import FORMS, OPTIMIZERS, init, lenient

import si_jax

COMPACT = {
    "compact": functools.partial(
        si_jax.with_synaptic_intelligence, state_dtype="compact"
    ),
    "compact link": lambda inner, *args, **kwargs: optax.chain(
        si_jax.synaptic_intelligence(*args, **kwargs, state_dtype="compact"), inner
    ),
}

STRENGTH, DAMPING = 0.5, 0.1
ADAM = OPTIMIZERS["adam"]
TASKS, STEPS = 3, 5
RANDOM = np.random.default_rng(0)
GRADS = [
    [
        {name: RANDOM.normal(1, 1, x.shape).astype("f4") for name, x in init().items()}
        for _ in range(STEPS)
    ]
    for _ in range(TASKS)
]

INNER = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "adabelief": optax.adabelief(0.1),
    "adafactor": optax.adafactor(0.01, multiply_by_parameter_scale=False),
    "lamb": optax.lamb(0.002),
    "lion": optax.lion(0.005),
    "novograd": optax.novograd(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "sm3": optax.sm3(1.0),
    "yogi": optax.yogi(0.1),
    "muon": contrib.muon(0.1),
    "prodigy": contrib.prodigy(0.1),
    "schedule_free": contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
}

forms = pytest.mark.parametrize("form", FORMS)
FORMS = {**FORMS, **COMPACT}
every_form = pytest.mark.parametrize("form", FORMS)
inners = pytest.mark.parametrize("inner", INNER)


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def pointers(*trees):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(trees)]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def step_of(tx):
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(tx):
    """Where each task ends, step by step and with an eager consolidate."""
    params, step = init(), jax.jit(step_of(tx))
    opt_state = tx.init(params)
    for task in GRADS:
        for grads in task:
            params, opt_state = step(params, opt_state, grads)
        opt_state = si_jax.consolidate(opt_state, params)
        yield params, opt_state


def scanned_train(tx):
    """Where the last task ends: one scan, in which a flag says when to consolidate."""

    def step(carry, inputs):
        grads, last = inputs
        params, opt_state = step_of(tx)(*carry, grads)
        opt_state = jax.lax.cond(
            last, si_jax.consolidate, lambda s, _: s, opt_state, params
        )
        return (params, opt_state), None

    flags = jnp.arange(TASKS * STEPS) % STEPS == STEPS - 1
    inputs = stack([grads for task in GRADS for grads in task]), flags
    yield jax.lax.scan(step, (init(), tx.init(init())), inputs)[0]


@inners
@forms
def test_optimizers_reach_the_minimum_of_loss_and_surrogate(form, inner):
    """On a parabola, (target + c Ω θ̃) / (1 + c Ω); all along one compiled function."""
    tx = FORMS[form](lenient(INNER[inner]), STRENGTH, DAMPING)
    traces = []

    @jax.jit
    def descend(params, opt_state, target):
        traces.append(target)

        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = tx.update(
                2 * (params - target), opt_state, params, extra_arg_nobody_knows=1
            )
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), length=3000)[0]

    params, target = jnp.array([-1.0, 3.0, 1.0]), jnp.array([1.0, -1.0, 1.0])
    params, opt_state = descend(params, tx.init(params), target)
    np.testing.assert_allclose(params, target, rtol=2e-2)

    opt_state = si_jax.consolidate(opt_state, params)
    _, omega, reference = si_jax.synapses(opt_state)
    assert (omega[:2] > 0.7).all()
    target = jnp.array([2.0, 1.0, 1.0])
    minimum = (target + STRENGTH * omega * reference) / (1 + STRENGTH * omega)
    opt_state = si_jax.reset_optimizer(tx, opt_state, params)
    params, opt_state = descend(params, opt_state, target)
    np.testing.assert_allclose(params, minimum, rtol=2e-2)
    assert len(traces) == 1


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@inners
@forms
def test_dtypes_shapes_and_weak_types_are_stable(form, inner, dtype, state_dtype):
    """The carry of a scan, both branches of a cond, and the updates keep theirs."""
    with jax.enable_x64(dtype == "float64"):
        tx = FORMS[form](
            lenient(INNER[inner]),
            strength=1,
            damping=jnp.bfloat16(0.1),
            state_dtype=state_dtype,
        )
        grads = init(dtype)

        def step(carry, flag):
            params, opt_state = carry
            updates, opt_state = jax.lax.cond(
                flag,
                lambda: tx.update(grads, opt_state, params),
                lambda: (grads, opt_state),
            )
            params = optax.apply_updates(params, updates)
            opt_state = jax.lax.cond(
                flag, si_jax.consolidate, lambda s, _: s, opt_state, params
            )
            return (params, opt_state), updates

        before = jax.eval_shape(tx.init, grads)
        (params, after), updates = jax.eval_shape(
            functools.partial(jax.lax.scan, step),
            (grads, before),
            jnp.array([True, False]),
        )
        assert avals(after) == avals(before)
        assert avals(params) == avals(jax.eval_shape(lambda: grads))
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        path_integral, importance, reference = si_jax.synapses(after)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        assert path_integral["bias"].dtype == wide
        assert importance["bias"].dtype == (state_dtype or wide)
        assert reference["bias"].dtype == (state_dtype or dtype)
        scalar = ((), jnp.result_type(float), False)
        for name in ("strength", "damping"):
            assert avals(optax.tree.get(after, name)) == scalar


def test_wrapper_takes_a_transformation_without_extra_args():
    tx = si_jax.with_synaptic_intelligence(optax.scale(-0.1))
    params = jnp.ones(3)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    np.testing.assert_allclose(updates, -0.1 * params)


@forms
def test_extra_args_reach_the_inner_optimizer(form):
    inner = lenient(optax.polyak_sgd(0.3))
    tx, params = FORMS[form](inner), jnp.ones(3)
    args = {"value": jnp.float32(0.6), "unknown": None}
    expected, _ = inner.update(params, inner.init(params), params, **args)
    actual, _ = tx.update(params, tx.init(params), params, **args)
    np.testing.assert_allclose(actual, expected)


@every_form
def test_missing_params_raise_the_error_of_optax(form):
    tx, decay, params = FORMS[form](ADAM), optax.add_decayed_weights(0.1), init()
    with pytest.raises(ValueError, match="requires the current value") as expected:
        decay.update(params, decay.init(params), None)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match="requires the current value") as actual:
            update(params, tx.init(params))
        assert str(actual.value) == str(expected.value)


@forms
def test_multi_steps_accumulates_between_updates(form):
    """Every second call updates, with the mean gradient: θ, ω and Ω as without."""
    tx = FORMS[form](ADAM, STRENGTH, DAMPING)
    multi = lenient(optax.MultiSteps(tx, 2).gradient_transformation())
    step, update = jax.jit(step_of(tx)), jax.jit(multi.update)
    p = q = init()
    s, t = tx.init(p), multi.init(q)
    for task in GRADS:
        s, t = si_jax.consolidate(s, p), si_jax.consolidate(t, q)
        for pair in zip(task[::2], task[1::2], strict=False):
            p, s = step(p, s, jax.tree.map(lambda a, b: (a + b) / 2, *pair))
            updates, t = update(pair[0], t, q)
            chex.assert_trees_all_equal(updates, optax.tree.zeros_like(q))
            updates, t = update(pair[1], t, q)
            q = optax.apply_updates(q, updates)
    chex.assert_trees_all_close(q, p, rtol=1e-5)
    chex.assert_trees_all_close(si_jax.synapses(t), si_jax.synapses(s), rtol=1e-4)
    assert optax.tree.norm(si_jax.synapses(t).path_integral) > 0


def injected(form, inner):
    """The form with strength and damping as hyperparameters that optax injects."""
    if form == "wrapper":
        return optax.inject_hyperparams(
            functools.partial(si_jax.with_synaptic_intelligence, inner)
        )
    link = optax.inject_hyperparams(si_jax.synaptic_intelligence)
    return lambda *args, **kwargs: optax.chain(link(*args, **kwargs), inner)


@forms
def test_injected_numbers_equal_plain_ones(form):
    ends = train(injected(form, ADAM)(STRENGTH, damping=DAMPING))
    plain = train(FORMS[form](ADAM, STRENGTH, DAMPING))
    for (q, t), (p, s) in zip(ends, plain, strict=True):
        chex.assert_trees_all_close(q, p, rtol=1e-5)
        chex.assert_trees_all_close(si_jax.synapses(t), si_jax.synapses(s), rtol=1e-5)
        np.testing.assert_allclose(
            si_jax.surrogate_loss(t, init()),
            si_jax.surrogate_loss(s, init()),
            rtol=1e-5,
        )


@forms
def test_scheduled_strength_is_in_force(form):
    """Updates pull back with the strength of their step; the penalty has the last."""

    def schedule(count):
        return jnp.where(count < 2, 1.0, 3.0)

    tx = injected(form, optax.sgd(0.1))(strength=schedule, damping=DAMPING)
    params = jnp.ones(3)
    opt_state = tx.init(params)
    _, opt_state = tx.update(-jnp.ones(3), opt_state, params)
    params += 1.0
    opt_state = si_jax.consolidate(opt_state, params)
    omega = si_jax.synapses(opt_state).importance
    assert (omega > 0).all()
    params += 1.0
    for strength in [1.0, 3.0, 3.0]:
        updates, opt_state = jax.jit(tx.update)(jnp.zeros(3), opt_state, params)
        np.testing.assert_allclose(updates, -0.1 * 2 * strength * omega, rtol=1e-6)
        penalty = si_jax.surrogate_loss(opt_state, params)
        np.testing.assert_allclose(penalty, strength * omega.sum(), rtol=1e-6)


@every_form
def test_map_params_sees_every_tree_of_parameters(form):
    tx, params = FORMS[form](ADAM, STRENGTH), init()
    opt_state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, opt_state)
    chex.assert_trees_all_equal(same, opt_state)
    marked = optax.tree.map_params(
        tx,
        lambda x, name: f"{name} of {x.shape}",
        opt_state,
        {"bias": "b", "kernel": "k"},
        transform_non_params=lambda x: x.ndim,
    )
    assert jax.tree.structure(marked) == jax.tree.structure(opt_state)
    trees = optax.tree.get_all_with_path(marked, "mu")
    trees += [(None, tree) for tree in si_jax.synapses(marked)]
    if form == "link":
        trees += [(None, marked[0].last_params), (None, marked[0].last_grads)]
    for _, tree in trees:
        assert tree == {"bias": "b of (3,)", "kernel": "k of (4, 3)"}
    assert optax.tree.get(marked, "strength") == 0


@every_form
def test_sharded_state_trains_as_an_unsharded_one(form):
    """Shardings of the state come from those of the parameters, by map_params."""
    mesh = jax.make_mesh(
        (min(4, jax.device_count()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    specs = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    tx, params = FORMS[form](ADAM, STRENGTH, DAMPING), init()
    opt_state = tx.init(params)
    placed = jax.device_put(params, shardings)
    placement = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        opt_state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    placed_state = jax.device_put(opt_state, placement)
    grads = GRADS[0][0]
    placed_grads = jax.device_put(grads, shardings)
    update, end = jax.jit(tx.update), jax.jit(si_jax.consolidate)
    for _ in range(3):
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        updates, placed_state = update(placed_grads, placed_state, placed)
        placed = optax.apply_updates(placed, updates)
    opt_state, placed_state = end(opt_state, params), end(placed_state, placed)
    kernel = si_jax.synapses(placed_state).importance["kernel"]
    assert kernel.sharding.is_equivalent_to(shardings["kernel"], 2)
    chex.assert_trees_all_close(placed_state, opt_state, rtol=1e-4, atol=1e-7)


# --- Buffers --------------------------------------------------------------------------

STRENGTHS = {
    "numbers": lambda form: FORMS[form](ADAM, STRENGTH, DAMPING),
    "one array for both": lambda form: FORMS[form](ADAM, *[jnp.float32(0.1)] * 2),
    "injected": lambda form: injected(form, ADAM)(STRENGTH, DAMPING),
}


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("strengths", STRENGTHS)
@every_form
def test_state_aliases_neither_the_parameters_nor_itself(form, strengths, compiled):
    tx, params = STRENGTHS[strengths](form), init()
    grads = jax.tree.map(jnp.ones_like, params)
    reset = functools.partial(si_jax.reset_optimizer, tx)
    states = [compiled(tx.init)(params)]
    states.append(compiled(tx.update)(grads, states[0], params)[1])
    states.append(compiled(si_jax.consolidate)(states[1], params))
    states.append(compiled(reset)(states[1], params))
    for opt_state in states:
        buffers = pointers(params, grads, opt_state)
        assert len(buffers) == len(set(buffers))


@every_form
def test_state_does_not_alias_the_strength_of_the_caller(form):
    strength = jnp.float32(STRENGTH)
    tx = FORMS[form](ADAM, strength, DAMPING)
    opt_state = tx.init(init())
    assert strength.unsafe_buffer_pointer() not in pointers(opt_state)
    jax.jit(si_jax.consolidate, donate_argnums=0)(opt_state, init())
    assert not strength.is_deleted()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@every_form
def test_params_and_state_can_be_donated(form, jit):
    """Three tasks with every buffer given away end where those that keep all do."""
    tx, params = FORMS[form](ADAM, STRENGTH, DAMPING), init()
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    end = jax.jit(si_jax.consolidate, donate_argnums=0) if jit else si_jax.consolidate
    opt_state = tx.init(params)
    for task, expected in zip(GRADS, train(tx), strict=True):
        for grads in task:
            given = params, [x for x in jax.tree.leaves(opt_state) if x.ndim]
            params, opt_state = step(params, opt_state, grads)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
        opt_state = end(opt_state, params)
        chex.assert_trees_all_close((params, opt_state), expected, rtol=1e-5)


@every_form
def test_params_survive_the_donation_of_the_state(form):
    tx, params = FORMS[form](ADAM, STRENGTH, DAMPING), init()
    update = jax.jit(tx.update, donate_argnums=1)
    end = jax.jit(si_jax.consolidate, donate_argnums=0)
    opt_state = tx.init(params)
    for boundary in (si_jax.consolidate, end):
        _, opt_state = update(params, opt_state, params)
        opt_state = boundary(opt_state, params)
    update(params, opt_state, params)
    chex.assert_trees_all_equal(params, init())


@pytest.mark.parametrize(
    ("form", "dtype", "limit"),
    [
        ("link", None, 20),
        ("wrapper", None, 12),
        ("link", "bfloat16", 16),
        ("wrapper", "bfloat16", 8),
        ("link", "compact", 13),
        ("wrapper", "compact", 5),
    ],
)
def test_bytes_of_state_per_parameter(form, dtype, limit):
    """Beyond the inner optimizer's, for float32: ω, Ω, θ̃; the link's last θ and g."""
    tx, params = FORMS[form](ADAM, state_dtype=dtype), jnp.ones(100_000)
    opt_state = tx.init(params)
    states = [opt_state, jax.jit(tx.update)(params, opt_state, params)[1]]
    states.append(si_jax.consolidate(states[-1], params))
    for state in states:
        own = sum(x.nbytes for x in jax.tree.leaves(state))
        own -= sum(x.nbytes for x in jax.tree.leaves(ADAM.init(params)))
        assert own <= limit * params.size + 16


@forms
def test_a_narrow_state_rounds_importance_and_reference_and_nothing_else(form):
    """Of a task that starts at zero, which bfloat16 holds as it is."""

    def last(dtype):
        tx = FORMS[form](ADAM, STRENGTH, DAMPING, state_dtype=dtype)
        params, step = jax.tree.map(jnp.zeros_like, init()), jax.jit(step_of(tx))
        opt_state = tx.init(params)
        for grads in GRADS[0]:
            params, opt_state = step(params, opt_state, grads)
        opt_state = si_jax.consolidate(opt_state, params)
        importance, reference = si_jax.synapses(opt_state)[1:]
        updates, _ = tx.update(GRADS[1][0], opt_state, params)
        return importance, reference, si_jax.surrogate_loss(opt_state, params), updates

    wide, explicit, narrow = map(last, (None, jnp.float32, jnp.bfloat16))
    chex.assert_trees_all_equal(wide, explicit)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide[1])
    chex.assert_trees_all_equal(narrow[1], rounded)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), narrow[0])
    chex.assert_trees_all_close(widened, wide[0], rtol=2**-7)  # to a neighbour
    assert wide[2] == 0
    assert 0 < narrow[2] < 1e-5, "pulled to the rounded value"
    chex.assert_trees_all_close(narrow[3], wide[3], rtol=0.01)


@every_form
def test_a_state_of_weakly_typed_parameters_is_stable(form):
    tx, params = FORMS[form](ADAM), {"w": jnp.full(3, 0.1)}
    before = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(si_jax.consolidate, before, params)
    assert avals(after) == avals(before)


# --- Transformations of JAX -----------------------------------------------------------


@every_form
def test_consolidate_in_a_scan_whenever_a_flag_says_so(form):
    tx = FORMS[form](ADAM, STRENGTH, DAMPING)
    *_, expected = train(tx)
    (actual,) = scanned_train(tx)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@forms
def test_whole_runs_can_be_swept_by_vmap(form):
    def outcome(train, *point):
        *_, (params, opt_state) = train(FORMS[form](ADAM, *point))
        penalty = si_jax.surrogate_loss(opt_state, init())
        return params, si_jax.synapses(opt_state), penalty

    grid = [(0.0, 0.1), (0.5, 0.1), (0.5, 0.01)]
    sweep = jax.jit(jax.vmap(functools.partial(outcome, scanned_train)))
    swept, each = sweep(*jnp.array(grid).T), [outcome(train, *point) for point in grid]
    chex.assert_trees_all_close(swept, stack(each), rtol=1e-4, atol=1e-6)
    assert len(np.unique(swept[0]["bias"], axis=0)) == len(grid)


@pytest.fixture(scope="module", params=FORMS)
def unfinished(request):
    """A transformation, and two of its states and parameters in the midst of a task."""
    tx = FORMS[request.param](ADAM, STRENGTH, DAMPING)
    step, (first, second, _) = step_of(tx), train(tx)
    return tx, [step(*end, GRADS[0][0])[::-1] for end in (first, second)]


def test_consolidate_under_jit(unfinished):
    for midst in unfinished[1]:
        actual = jax.jit(si_jax.consolidate)(*midst)
        chex.assert_trees_all_close(actual, si_jax.consolidate(*midst), rtol=1e-5)


def test_consolidate_under_vmap(unfinished):
    _, midsts = unfinished
    actual = jax.vmap(si_jax.consolidate)(*stack(midsts))
    expected = stack([si_jax.consolidate(*midst) for midst in midsts])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    before, after = map(si_jax.synapses, (stack(midsts)[0], actual))
    assert (after.importance["bias"] != before.importance["bias"]).any()


def test_batched_state_outside_of_vmap_is_an_error(unfinished):
    tx, midsts = unfinished
    opt_state, params = stack(midsts)
    reset = functools.partial(si_jax.reset_optimizer, tx)
    for function in (si_jax.consolidate, si_jax.surrogate_loss, reset):
        with pytest.raises(ValueError, match=r"batched, \(2,\) .* inside jax.vmap"):
            function(opt_state, params)


# --- What optax's own tests of its contributed optimizers ask beside ------------------

EIGHT = {
    "sgd": (optax.sgd, 1e-3),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), 5e-4),
    "adam": (optax.adam, 1e-2),
    "adamw": (functools.partial(optax.adamw, weight_decay=1e-5), 1e-2),
    "rmsprop": (optax.rmsprop, 1e-3),
    "lion": (optax.lion, 1e-3),
    "adagrad": (optax.adagrad, 0.5),
    "adafactor": (
        functools.partial(optax.adafactor, multiply_by_parameter_scale=False),
        1e-3,
    ),
}

eight = pytest.mark.parametrize(("optimizer", "rate"), EIGHT.values(), ids=EIGHT)


@eight
def test_eight_optimizers_end_where_they_do_without_at_strength_zero(optimizer, rate):
    """At the minimum of parabolas and Rosenbrock's, each hundred steps being a task.

    Rounding, which differs from program to program, moves the end within the valley.
    """
    start = {"vector": jnp.array([-1.0, 10.0, 1.0])}, [jnp.zeros((2, 2)), jnp.zeros(2)]
    target = (
        {"vector": jnp.array([1.0, -1.0, 1.0])},
        [jnp.array([[3.0, -2.0], [1.0, 4.0]]), jnp.ones(2)],
    )

    def loss(params):
        *away, _ = jax.tree.leaves(optax.tree.sub(params, target))
        x, y = params[1][1]
        valley = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        return valley + optax.tree.norm(away, squared=True)

    def descend(tx, boundary):
        def step(carry, _):
            params, opt_state = carry
            return step_of(tx)(params, opt_state, jax.grad(loss)(params)), None

        def task(carry, _):
            params, opt_state = jax.lax.scan(step, carry, length=100)[0]
            return (params, boundary(opt_state, params)), None

        return jax.lax.scan(task, (start, tx.init(start)), length=300)[0]

    @jax.jit
    def run():
        inner = lenient(optimizer(rate))
        plain, _ = descend(inner, lambda s, _: s)
        forms = [FORMS[name](inner, strength=0.0) for name in ("link", "wrapper")]
        return plain, [descend(tx, si_jax.consolidate) for tx in forms]

    plain, ends = run()
    chex.assert_trees_all_close(plain, target, rtol=3e-2, atol=3e-2)
    for params, opt_state in ends:
        chex.assert_trees_all_close(params, plain, rtol=5e-3, atol=5e-3)
        assert optax.tree.norm(si_jax.synapses(opt_state).importance) > 1


@eight
@forms
def test_eight_optimizers_take_an_injected_learning_rate(form, optimizer, rate):
    """A number or a schedule, injected around the whole: updates and state as plain."""

    def make(learning_rate):
        return lenient(FORMS[form](optimizer(learning_rate), STRENGTH, DAMPING))

    inject = optax.inject_hyperparams(make)
    injected = [lenient(inject(given)) for given in (rate, lambda _: jnp.float32(rate))]

    @jax.jit
    def first(grads):
        params, txs = init(), [make(rate), *injected]
        return [tx.update(grads, tx.init(params), params) for tx in txs]

    (expected, state), *actual = first(GRADS[0][0])
    for updates, opt_state in actual:
        both = updates, opt_state.inner_state
        chex.assert_trees_all_close(both, (expected, state), rtol=1e-5)
    same = optax.tree.map_params(make(rate), lambda x: x, state)
    chex.assert_trees_all_equal(same, state)


@eight
@forms
def test_eight_optimizers_accumulate_gradients_in_bfloat16(form, optimizer, rate):
    """By optax.MultiSteps: nothing, and then the update of the mean, in their dtype."""
    tx = FORMS[form](lenient(optimizer(rate)), STRENGTH, DAMPING)
    multi = lenient(optax.MultiSteps(tx, 4).gradient_transformation())

    @jax.jit
    def run(params):
        def step(opt_state, _):
            return multi.update(params, opt_state, params)[::-1]

        updates = jax.lax.scan(step, multi.init(params), length=4)[1]
        return updates, tx.update(params, tx.init(params), params)[0]

    params = init("bfloat16")
    updates, expected = run(params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    before, last = (
        jax.tree.map(part, updates) for part in (lambda x: x[:3], lambda x: x[3])
    )
    chex.assert_trees_all_equal(before, optax.tree.zeros_like(before))
    chex.assert_trees_all_close(last, expected, rtol=1e-2)
