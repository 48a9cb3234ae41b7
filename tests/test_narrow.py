"""Memories of few bytes, against sums in float64 and the same in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from problem import OPTIMIZERS, init, train
from test_oracle import DAMPING, STRENGTH, Oracle

import si_jax
from si_jax import ewc, narrow

RNG = np.random.default_rng(0)
ROOTS = np.arange(0x7C, dtype=np.uint8).view(narrow.ROOT)  # from 0 to the largest
SQUARES = ROOTS.astype(np.float32) ** 2
FORMS = {
    "wrapper": si_jax.with_synaptic_intelligence,
    "link": lambda inner, *args, **kwargs: optax.chain(
        si_jax.synaptic_intelligence(*args, **kwargs), inner
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def gaussian(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_every_square_of_a_float8_is_held_exactly(sign):
    squares = jnp.asarray(sign * SQUARES)
    for seed in gaussian(20):
        held = narrow.written(squares, narrow.ROOT, jnp.full_like(squares, seed))
        np.testing.assert_array_equal(narrow.read(held), squares)


@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1 + 2**-7), (None, 1.57)])
def test_what_is_written_is_a_neighbour_and_right_in_the_mean(dtype, factor):
    dtype = jnp.dtype(dtype or narrow.ROOT)
    numbers = np.exp(RNG.uniform(np.log(1e-8), np.log(1e9), 50)).astype(np.float32)
    x = jnp.repeat(jnp.asarray(numbers)[:, None], 10_000, 1)
    seeds = gaussian(*x.shape), gaussian(*x.shape)
    held = narrow.read(narrow.written(x, dtype, *seeds)).astype(jnp.float32)
    ratio = np.asarray(held / x, np.float64)
    assert (ratio < factor).all()
    assert (ratio > 1 / factor).all()
    error = ratio.std(1) / np.sqrt(x.shape[1])
    np.testing.assert_array_less(np.abs(ratio.mean(1) - 1), 4.5 * error + 1e-7)


def test_what_is_too_large_stays_the_largest_and_no_number_none():
    x = jnp.array([3.3e9, 1e30, jnp.inf, jnp.nan, 0.0, -0.0, 1e-30])
    for compiled in (lambda f: f, jax.jit):
        held = narrow.read(compiled(lambda x: narrow.written(x, narrow.ROOT, x))(x))
        largest = SQUARES[-1]
        np.testing.assert_array_equal(held, [largest] * 3 + [np.nan, 0, 0, 0])
        half = compiled(lambda x: narrow.written(x, jnp.bfloat16, x))(x)
        np.testing.assert_array_equal(
            half[2:6].astype(jnp.float32), [np.inf, np.nan, 0, 0]
        )


# --- Long sums ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0, 3])
def test_a_million_steps_sum_up(noise):
    """Each adds about 2⁻²⁰, up to a sum of 1; rounded to the nearest it stops at 2⁻¹².

    A synapse's own error is about the root of bfloat16's gap, and of no sign.
    """
    steps, synapses = 2**20, 256
    tx = si_jax.with_synaptic_intelligence(
        optax.sgd(2.0**-20), 0.0, state_dtype="compact"
    )
    start = jnp.asarray(RNG.uniform(-1, 0, synapses), jnp.float32)
    rate = jnp.asarray(RNG.uniform(1, 1.1, synapses), jnp.float32)
    signs = jnp.asarray(RNG.choice([-noise, noise], (1024, synapses)), jnp.float32)

    def step(carry, i):
        params, opt_state, total = carry
        grads = rate + signs[i % 1024]
        updates, opt_state = tx.update(grads, opt_state, params)
        after = optax.apply_updates(params, updates)
        total -= (grads * (after - params)).astype(total.dtype)
        return (after, opt_state, total), None

    def run():
        total = jnp.zeros_like(start, jnp.float64)
        carry = start, tx.init(start), total
        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    with jax.enable_x64():
        _, opt_state, total = jax.jit(run)()
    ratio = np.asarray(si_jax.synapses(opt_state).path_integral / np.float32(total))
    assert ratio.std() < 0.08
    error = ratio.std() / np.sqrt(synapses)
    np.testing.assert_allclose(ratio.mean(), 1, rtol=0, atol=4 * error)


@pytest.mark.parametrize(
    ("dtype", "each", "mean"), [("bfloat16", 0.1, 0.01), ("compact", 0.5, 0.05)]
)
def test_the_importance_of_a_hundred_tasks_adds_up(dtype, each, mean):
    """The first has a hundred times the importance of each other."""
    synapses = 1000
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), 1.0, state_dtype=dtype)
    opt_state = tx.init(jnp.zeros(synapses))
    add, total = jax.jit(si_jax.add_importance), np.zeros(synapses)
    for task in range(100):
        new = np.square(gaussian(synapses)) + 0.5
        new *= 100 if task == 0 else 1
        opt_state = add(opt_state, new)
        total += new
    ratio = si_jax.synapses(opt_state).importance.astype(jnp.float32) / total
    assert ratio.std() < each
    np.testing.assert_allclose(ratio.mean(), 1, rtol=mean)


# --- EWC in four bytes ----------------------------------------------------------------


def test_elastic_weight_consolidation_keeps_four_bytes():
    link = ewc.elastic_weight_consolidation(1.0, state_dtype="bfloat16")
    params = jnp.ones(1000)
    state = link.init(params)
    states = [state, jax.jit(link.update)(params, state, params)[1]]
    states.append(ewc.consolidate(states[-1], params, params))
    states.append(si_jax.add_importance(states[-1], params))
    states.append(si_jax.carry_over(states[-1], into=link.init(params)))
    for state in states:
        assert sum(x.nbytes for x in jax.tree.leaves(state)) <= 4 * params.size + 16
        assert avals(state) == avals(states[0])


@pytest.mark.parametrize("decay", [None, 0.95])
def test_a_hundred_penalties_of_ewc_in_bfloat16(decay):
    """θ wanders; ΣF and θ̃ are those of float32 to about a percent, and unbiased."""
    synapses = 2000
    wide, half = (
        ewc.elastic_weight_consolidation(1.0, decay=decay, state_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    theta = 1 + gaussian(synapses) / 10
    end = jax.jit(ewc.consolidate)
    states = [tx.init(theta) for tx in (wide, half)]
    for task in range(100):
        fisher = np.square(gaussian(synapses)) * (100 if task == 0 else 1)
        states = [end(state, theta, fisher) for state in states]
        theta = theta + gaussian(synapses) / 100
    exact, rounded = (jax.tree.map(np.float64, s) for s in states)
    ratio = rounded.importance / exact.importance
    assert ratio.std() < 0.02
    np.testing.assert_allclose(ratio.mean(), 1, rtol=0.002)
    away = rounded.reference - exact.reference
    assert away.std() < 0.01
    assert np.abs(away.mean()) < 5 * away.std() / np.sqrt(synapses)


def test_a_parameter_that_rests_stays_where_bfloat16_has_it():
    """Pulled to a neighbour at most; not at all, if bfloat16 holds it as it is."""
    link = ewc.elastic_weight_consolidation(1.0, state_dtype="bfloat16")
    theta = jnp.asarray(gaussian(1000)).at[0].set(0.75)
    state = link.init(theta)
    for _ in range(100):
        state = ewc.consolidate(state, theta, np.square(gaussian(1000)))
    np.testing.assert_allclose(
        state.reference.astype(jnp.float32), theta, rtol=2**-7, atol=0
    )
    assert state.reference[0] == 0.75
    pulled, _ = link.update(jnp.zeros(1000), state, theta)
    assert pulled[0] == 0


def test_free_consolidation_takes_the_second_moment_into_four_bytes():
    params = jnp.zeros(3)
    link = ewc.elastic_weight_consolidation(1.0, state_dtype="bfloat16")
    tx = optax.chain(link, optax.adam(0.1, b2=0.5))
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(tx.update)(
            jnp.array([0.5, 1.0, 0.0]), tx.init(params), params
        )
    F = si_jax.importance.second_moment(state, b2=0.5, batch_size=64)
    state = ewc.consolidate(state, params, F)
    np.testing.assert_allclose(si_jax.surrogate_loss(state, params + 1), 16 + 64, 1e-2)


def test_state_dtypes_of_ewc_are_checked():
    for bad in ("float16", "compact", "int8", "bfloat61"):
        with pytest.raises(ValueError, match=r"state_dtype must be bfloat16, .* got"):
            ewc.elastic_weight_consolidation(1.0, state_dtype=bad)


# --- SI in five bytes -----------------------------------------------------------------


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lion"])
@forms
def test_compact_importances_are_those_of_the_oracle(form, optimizer, nonnegative):
    """Each within the steps of float8 and bfloat16, all of them on average."""
    params = init()
    tx = FORMS[form](
        OPTIMIZERS[optimizer],
        STRENGTH,
        DAMPING,
        nonnegative=nonnegative,
        state_dtype="compact",
    )
    oracle, ratios = Oracle(params, nonnegative=nonnegative), []
    for visited, end, opt_state in train(tx, params):
        oracle.task(visited, end)
        _, importance, reference = si_jax.synapses(opt_state)
        expected = np.concatenate(
            [x.ravel() for x in jax.tree.leaves(oracle.importance)]
        )
        found = np.concatenate([x.ravel() for x in jax.tree.leaves(importance)])
        np.testing.assert_allclose(
            found, expected, rtol=0.8, atol=0.1 * np.abs(expected).max()
        )
        ratios.append(found.sum() / expected.sum())
        jax.tree.map(
            lambda r, p: np.testing.assert_array_equal(r, p.astype(jnp.bfloat16)),
            reference,
            end,
        )
    np.testing.assert_allclose(ratios, 1, rtol=0.15)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@forms
def test_compact_dtypes_are_stable(form, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = FORMS[form](OPTIMIZERS["adam"], 1.0, state_dtype="compact")
        params = init(dtype)
        before = jax.eval_shape(tx.init, params)

        def step(opt_state):
            updates, opt_state = tx.update(params, opt_state, params)
            return updates, si_jax.consolidate(opt_state, params)

        updates, after = jax.eval_shape(step, before)
        assert avals(after) == avals(before)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        views = jax.eval_shape(si_jax.synapses, after)
        of = [{str(x.dtype) for x in jax.tree.leaves(tree)} for tree in views]
        assert of == [{"float32"}, {"float32"}, {"bfloat16"}]


@forms
def test_a_compact_memory_grows_and_goes_into_other_states(form):
    make = functools.partial(FORMS[form], OPTIMIZERS["adam"], STRENGTH, DAMPING)
    tx = make(state_dtype="compact")
    ((_, params, opt_state),) = train(tx, init(), tasks=1)
    larger = jax.tree.map(lambda p: jnp.pad(p, [(0, 2)] * p.ndim), params)
    held = si_jax.synapses(opt_state).importance
    padded = jax.tree.map(lambda p: jnp.pad(p, [(0, 2)] * p.ndim), held)
    carry = jax.jit(lambda state, new: si_jax.carry_over(state, into=new))
    grown = carry(opt_state, tx.init(larger))
    wide = carry(grown, make().init(larger))
    back = carry(wide, tx.init(larger))
    for state in (grown, wide, back):
        found = si_jax.synapses(state).importance
        jax.tree.map(np.testing.assert_array_equal, found, padded)
    assert avals(back) == avals(grown)
    reset = si_jax.reset_optimizer(tx, grown, larger)
    jax.tree.map(
        np.testing.assert_array_equal,
        si_jax.synapses(reset).importance,
        padded,
    )
    away = jax.tree.map(lambda p: p + 1, larger)
    report = si_jax.diagnose(grown, away)
    for name, x in held.items():
        np.testing.assert_allclose(report.importance[name], x.sum(), rtol=1e-6)
    penalty = si_jax.surrogate_loss(grown, away)
    np.testing.assert_allclose(penalty, sum(report.penalty.values()), rtol=1e-5)
    np.testing.assert_allclose(
        penalty, STRENGTH * sum(x.sum() for x in held.values()), rtol=0.02
    )


def test_orbax_keeps_a_compact_state(tmp_path):
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), state_dtype="compact")
    params = jnp.asarray(gaussian(8, 3))
    _, opt_state = tx.update(params, tx.init(params), params)
    opt_state = si_jax.consolidate(opt_state, params - 0.1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", opt_state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    assert avals(restored) == avals(opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored, opt_state)
    assert si_jax.synapses(restored).importance.any()


def test_the_same_inputs_give_the_same_state_on_one_device_and_on_many():
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), 1.0, state_dtype="compact")
    runs = [(gaussian(8, 16), gaussian(5, 8, 16)) for _ in range(4)]
    starts, streams = (jnp.stack(x) for x in zip(*runs, strict=True))

    def run(params, stream):
        def step(carry, grads):
            params, opt_state = carry
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), stream)
        return si_jax.consolidate(carry[1], carry[0]).synapses

    alone = [jax.jit(run)(*each) for each in zip(starts, streams, strict=True)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    mesh = jax.make_mesh(
        (4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    rows = jax.NamedSharding(mesh, jax.P(None, "x"))
    sharded = jax.device_put(starts, rows)
    for found in (
        jax.jit(jax.vmap(run))(starts, streams),
        jax.jit(jax.vmap(run))(sharded, streams),
        jax.pmap(run, devices=jax.devices()[:4])(starts, streams),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
