"""Between θ̃ and θ, against NumPy and the minimum that it is to be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from optax import contrib
from problem import FORMS, init, lenient, train
from test_kronecker import made_up

import si_jax
from si_jax import ewc, kronecker

SGD = optax.sgd(0.05)
MAKERS = {
    **{form: lambda form=form: FORMS[form](SGD, 0.5, 0.01) for form in FORMS},
    "compact": lambda: FORMS["wrapper"](SGD, 0.5, 0.01, state_dtype="compact"),
    "ewc": lambda: optax.chain(ewc.elastic_weight_consolidation(0.5), SGD),
    "kronecker": lambda: optax.chain(
        kronecker.kronecker_consolidation(0.5, made_up(0)), SGD
    ),
}
makers = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
elementwise = pytest.mark.parametrize(
    "maker", [MAKERS[k] for k in ("link", "wrapper", "ewc")]
)


def positive(seed, like):
    """Some importance, in which entries are 0."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [jnp.maximum(x, 0) for x in normal])


def trained(maker):
    """After a task: what it started from, the state in mid-task, the parameters."""
    tx, before = maker(), init()
    ((_, after, opt_state),) = train(tx, before, tasks=1, boundary=lambda _, s, _p: s)
    return before, opt_state, after


@makers
def test_a_number_is_a_straight_line_that_begins_and_ends_exactly(maker):
    before, opt_state, after = trained(maker)
    merge = jax.jit(si_jax.merge)  # the weight is traced
    half = merge(opt_state, after, 0.25)
    narrow = maker is MAKERS["compact"]
    for name, x in half.items():
        start, end = (np.asarray(tree[name], np.float64) for tree in (before, after))
        tolerance = 2**-8 if narrow else 1e-6
        np.testing.assert_allclose(x, 0.75 * start + 0.25 * end, rtol=tolerance)
    chex.assert_trees_all_equal(merge(opt_state, after, 1), after, strict=True)
    if not narrow:
        chex.assert_trees_all_equal(merge(opt_state, after, 0), before, strict=True)


@elementwise
def test_by_importance_it_is_the_minimum_of_both_penalties(maker):
    before, opt_state, after = trained(maker)
    old, new = positive(1, before), positive(2, before)
    if maker is MAKERS["ewc"]:
        opt_state = ewc.consolidate(opt_state, before, old)
    else:
        opt_state = si_jax.add_importance(opt_state, old)
    merged = jax.jit(si_jax.merge)(opt_state, after, new)

    def both(params):
        terms = jax.tree.map(
            lambda p, r, o, t, n: jnp.sum(o * (p - r) ** 2 + n * (p - t) ** 2),
            *(params, before, old, after, new),
        )
        return sum(jax.tree.leaves(terms))

    slope = jax.grad(both)(merged)
    chex.assert_trees_all_close(slope, jax.tree.map(jnp.zeros_like, slope), atol=1e-5)
    for name, x in merged.items():  # nobody needs these: they stay
        free = (old[name] == 0) & (new[name] == 0)
        assert free.any() or name == "bias"
        np.testing.assert_array_equal(x[free], after[name][free])


def test_a_negative_importance_of_si_counts_as_none():
    tx = FORMS["wrapper"](optax.sgd(0.1), 0.0, 1.0, nonnegative=False)
    w = jnp.zeros(1)
    opt_state = tx.init(w)
    _, opt_state = tx.update(jnp.ones(1), opt_state, w)
    opt_state = si_jax.consolidate(opt_state, -jnp.ones(1))
    omega = si_jax.synapses(opt_state)
    opt_state = opt_state._replace(
        synapses=omega._replace(importance=-omega.importance)
    )
    assert si_jax.synapses(opt_state).importance < 0
    np.testing.assert_array_equal(
        si_jax.merge(opt_state, jnp.ones(1), jnp.full(1, 0.05)), jnp.ones(1)
    )


@makers
def test_several_networks_at_once(maker):
    before, opt_state, after = trained(maker)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), (opt_state, after))
    weights = jnp.array([0.0, 1.0])
    merged = jax.vmap(si_jax.merge)(*stack, weights)
    np.testing.assert_allclose(merged["bias"][0], before["bias"], rtol=2**-8)
    np.testing.assert_array_equal(merged["bias"][1], after["bias"])
    with pytest.raises(ValueError, match=r"batched.*inside jax\.vmap"):
        si_jax.merge(*stack, 0.5)


def test_what_is_masked_stays_and_every_group_has_its_own():
    params = init() | {"out": jnp.ones(2)}
    parts = {"bias": MAKERS["link"](), "kernel": MAKERS["ewc"](), "free": SGD}
    labels = {"kernel": "kernel", "bias": "bias", "out": "free"}
    tx = lenient(optax.partition(parts, labels))
    after = jax.tree.map(lambda x: x + 1, params)
    merged = si_jax.merge(tx.init(params), after, 0.5)
    for name, x in merged.items():
        moved = 1 if name == "out" else 0.5
        np.testing.assert_allclose(x, params[name] + moved, rtol=1e-5)


def test_containers_and_dtypes_are_the_parameters_own():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MAKERS["wrapper"](), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.map(lambda x: x + 1, before))
    params = nnx.state(model, nnx.Param)
    nnx.update(model, si_jax.merge(optimizer.opt_state, params, 0.5))
    np.testing.assert_allclose(
        model.kernel[...], before["kernel"][...] + 0.5, rtol=1e-5
    )

    module = linen.Dense(3, param_dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.bfloat16))
    state = TrainState.create(apply_fn=module.apply, params=variables, tx=SGD)
    opt_state = MAKERS["link"]().init(variables)
    merged = si_jax.merge(opt_state, state.params, 0.5)
    chex.assert_trees_all_equal(merged, variables, strict=True)


@pytest.mark.parametrize("form", FORMS)
def test_complex_parameters(form):
    params = {"lam": jnp.array([1 + 2j, -3j], jnp.complex64), "w": jnp.ones(2)}
    tx = contrib.split_real_and_imaginary(FORMS[form](SGD, 1.0, 0.01))
    opt_state = tx.init(params)
    after = jax.tree.map(lambda x: x + (1 + 1j if jnp.iscomplexobj(x) else 1), params)
    merged = si_jax.merge(opt_state, after, 0.5)
    np.testing.assert_allclose(merged["lam"], params["lam"] + (0.5 + 0.5j))
    ones = {"lam": jnp.array([1 + 3j, 1 + 3j], jnp.complex64), "w": jnp.ones(2)}
    opt_state = si_jax.add_importance(opt_state, jax.tree.map(jnp.ones_like, ones))
    # Of the imaginary part the old task has no need.
    merged = si_jax.merge(opt_state, after, ones)
    np.testing.assert_allclose(merged["lam"], params["lam"] + (0.5 + 1j))


def test_what_cannot_be_merged_is_named():
    params = init()
    ones = jax.tree.map(jnp.ones_like, params)
    opt_state = MAKERS["wrapper"]().init(params)
    for weight, message in (
        (-0.1, r"between 0, .* and 1, .*-0\.1"),
        (1.5, r"between 0, .* and 1, .*1\.5"),
        (np.nan, "between 0"),
        (jnp.ones(2), r"weight.* scalar|importance"),
        ("half", "must be a number"),
        (ones | {"bias": -ones["bias"]}, r"importance\['bias'\] is negative"),
        ({"bias": ones["bias"]}, r"importance\['kernel'\] is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            si_jax.merge(opt_state, params, weight)
    with pytest.raises(ValueError, match=r"params\['bias'\] is missing"):
        si_jax.merge(opt_state, {"kernel": params["kernel"]}, 0.5)
    with pytest.raises(ValueError, match="holds no Synaptic Intelligence"):
        si_jax.merge(SGD.init(params), params, 0.5)
    with pytest.raises(ValueError, match="weight must be a number"):
        si_jax.merge(MAKERS["kronecker"]().init(params), params, ones)
    both = optax.chain(MAKERS["link"](), MAKERS["ewc"]()).init(params)
    with pytest.raises(ValueError, match="more than once"):
        si_jax.merge(both, params, 0.5)
    si_jax.merge(both[1], params, 0.5)
