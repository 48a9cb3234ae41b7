"""Memory carried into states of other shapes, other forms and other optimizers."""

import chex
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from problem import FORMS, OPTIMIZERS, grad, init, lenient, loss

import si_jax
from si_jax import ewc

STRENGTH, DAMPING = 0.5, 0.01
ADAM, SGD = OPTIMIZERS["adam"], optax.sgd(0.05)
forms = pytest.mark.parametrize("form", FORMS)


def make(form, inner=SGD, **kwargs):
    return FORMS[form](inner, STRENGTH, DAMPING, **kwargs)


def larger(tree, new=None):
    """Five outputs instead of three, behind the old ones, and an adapter."""
    new = new or (lambda shape: jnp.linspace(0.1, 0.9, int(np.prod(shape))))

    def grow(old, *shape):
        corner = tuple(map(slice, old.shape))
        return new(shape).astype(old.dtype).reshape(shape).at[corner].set(old)

    kernel, bias = grow(tree["kernel"], 4, 5), grow(tree["bias"], 5)
    return {"kernel": kernel, "bias": bias, "adapter": new((2,)).astype(bias.dtype)}


def larger_grads(tree):
    return larger(tree, jnp.zeros)


def steps(tx, params, opt_state, *, task=0, count=3, pad=lambda grads: grads):
    """Some steps of the shared problem; ``pad`` makes the gradients of what grew."""
    update = jax.jit(tx.update)
    for step in range(count):
        small = {"kernel": params["kernel"][:, :3], "bias": params["bias"][:3]}
        grads = pad(grad(small, task, step))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def midst(tx, params=None):
    """A task, and a second one that has begun."""
    params = init() if params is None else params
    params, opt_state = steps(tx, params, tx.init(params))
    opt_state = si_jax.consolidate(opt_state, params)
    return steps(tx, params, opt_state, task=1, count=2)


def ended(form, target, params, opt_state):
    """In mid-task, unless a link is to become a wrapper."""
    if (form, target) == ("link", "wrapper"):
        opt_state = si_jax.consolidate(opt_state, params)
    return params, opt_state


def pointers(*trees):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(trees)}


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# --- Rules ----------------------------------------------------------------------------


@forms
def test_growing_by_nothing_is_the_identity(form):
    tx = make(form)
    params, opt_state = midst(tx)
    for into in (tx.init(params), opt_state):
        carried = si_jax.carry_over(opt_state, into=into)
        chex.assert_trees_all_equal(carried, opt_state, strict=True)
        assert avals(carried) == avals(opt_state)


@forms
def test_growing_commutes_with_training(form):
    """As long as the new entries get no gradient; in mid-task, too."""
    tx = make(form)
    params, opt_state = midst(tx)
    after, trained = steps(tx, params, opt_state, task=2)
    first = si_jax.carry_over(trained, into=tx.init(larger(after)))
    into = tx.init(larger(params))
    grown, carried = steps(
        tx,
        larger(params),
        si_jax.carry_over(opt_state, into=into),
        task=2,
        pad=larger_grads,
    )
    chex.assert_trees_all_close(grown, larger(after), rtol=1e-6)
    chex.assert_trees_all_close(carried, first, rtol=1e-5, atol=1e-8)


@forms
def test_old_blocks_are_kept_and_new_entries_are_free(form):
    tx = make(form, ADAM)
    params, opt_state = midst(tx)
    old = si_jax.synapses(opt_state)
    wanted = larger(params)
    carried = si_jax.carry_over(opt_state, into=tx.init(wanted))
    chex.assert_trees_all_equal(
        si_jax.synapses(carried),
        si_jax.Synapses(
            larger_grads(old.path_integral),
            larger_grads(old.importance),
            # Behind the old entries θ̃ is what ``into`` has: the new parameters.
            larger(old.reference),
        ),
    )
    assert si_jax.surrogate_loss(carried, wanted) == si_jax.surrogate_loss(
        opt_state, params
    )
    pull, _ = make(form, optax.sgd(1.0)).update(
        jax.tree.map(jnp.zeros_like, wanted),
        si_jax.carry_over(opt_state, into=make(form, optax.sgd(1.0)).init(wanted)),
        jax.tree.map(lambda x: x + 1, wanted),
    )
    expected = jax.tree.map(
        lambda omega, ref, p: -2 * STRENGTH * omega * (p + 1 - ref),
        old.importance,
        old.reference,
        params,
    )
    chex.assert_trees_all_close(pull, larger_grads(expected), rtol=1e-5, atol=1e-8)


class Account:
    """The method in float64, seen from outside, for parameters that grow."""

    def __init__(self, params):
        self.reference = [np.float64(p) for p in params]
        self.omega = [np.zeros(p.shape) for p in params]
        self.importance = [np.zeros(p.shape) for p in params]

    def grow(self, params):
        def extended(old, new):
            grown = [np.array(x, np.float64) for x in new]
            for whole, block in zip(grown, old, strict=False):
                whole[tuple(map(slice, block.shape))] = block
            return grown

        blank = [np.zeros(p.shape) for p in params]
        self.omega = extended(self.omega, blank)
        self.importance = extended(self.importance, blank)
        self.reference = extended(self.reference, params)

    def step(self, grads, before, after):
        for i, (g, b, a) in enumerate(zip(grads, before, after, strict=True)):
            self.omega[i] = self.omega[i] - np.float64(g) * (a - b)

    def consolidate(self, params):
        for i, p in enumerate(np.float64(p) for p in params):
            gain = self.omega[i] / ((p - self.reference[i]) ** 2 + DAMPING)
            self.importance[i] = np.maximum(self.importance[i] + gain, 0)
            self.reference[i], self.omega[i] = p, np.zeros(p.shape)


STAGE = st.fixed_dictionaries(
    {
        "form": st.sampled_from(list(FORMS)),
        "inner": st.sampled_from(["momentum", "adam"]),
        "growth": st.lists(st.integers(0, 1), min_size=3, max_size=3),
        "leaves": st.integers(0, 1),
        "steps": st.integers(1, 3),
        "ends": st.booleans(),
    }
)


@hypothesis.settings(deadline=None, max_examples=6, derandomize=True)
@hypothesis.given(stages=st.lists(STAGE, min_size=2, max_size=3), seed=st.integers(0))
def test_any_tree_any_growth(stages, seed):
    """Forms, optimizers, shapes and leaves change, also in mid-task; float64."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        params = [jnp.asarray(rng.normal(size=s)) for s in ((2,), (1, 2))]
        account, opt_state, form = Account(params), None, None
        for stage in stages:
            tx = make(stage["form"], OPTIMIZERS[stage["inner"]])
            if opt_state is not None and (form, stage["form"]) == ("link", "wrapper"):
                opt_state = si_jax.consolidate(opt_state, params)
                account.consolidate(params)
            form = stage["form"]
            if opt_state is None:
                opt_state = tx.init(params)
            else:
                shapes = [
                    tuple(np.add(p.shape, stage["growth"][: p.ndim])) for p in params
                ] + [(2,)] * stage["leaves"]
                grown = [rng.normal(size=shape) for shape in shapes]
                for whole, block in zip(grown, params, strict=False):
                    whole[tuple(map(slice, block.shape))] = block
                params = list(map(jnp.asarray, grown))
                opt_state = si_jax.carry_over(opt_state, into=tx.init(params))
                account.grow(params)
            for _ in range(stage["steps"]):
                grads = [jnp.asarray(rng.normal(size=p.shape)) for p in params]
                updates, opt_state = tx.update(grads, opt_state, params)
                before, params = params, optax.apply_updates(params, updates)
                account.step(grads, before, params)
            if stage["ends"]:
                opt_state = si_jax.consolidate(opt_state, params)
                account.consolidate(params)
        opt_state = si_jax.consolidate(opt_state, params)
        account.consolidate(params)
        held = si_jax.synapses(opt_state)
        chex.assert_trees_all_close(held.importance, account.importance, rtol=1e-9)
        chex.assert_trees_all_close(held.reference, account.reference, rtol=0)


# --- Forms, optimizers, hyperparameters -----------------------------------------------


@pytest.mark.parametrize("inner", ["adam", "sgd"])
@pytest.mark.parametrize("target", FORMS)
@forms
def test_another_optimizer_and_the_other_form(form, target, inner):
    """What a task leaves behind goes where the next is trained; the rest is new."""
    source = make(form, ADAM)
    params, opt_state = ended(form, target, *midst(source))
    into = FORMS[target](OPTIMIZERS[inner], 2.0, DAMPING).init(params)
    carried = si_jax.carry_over(opt_state, into=into)
    assert avals(carried) == avals(into)
    for name in ("strength", "count", "mu"):
        chex.assert_trees_all_equal(
            optax.tree.get(carried, name), optax.tree.get(into, name)
        )
    carried, expected = (
        si_jax.synapses(si_jax.consolidate(state, params)).importance
        for state in (carried, opt_state)
    )
    chex.assert_trees_all_close(carried, expected, rtol=1e-5)


def test_a_wrapper_that_becomes_a_link_credits_no_step_twice():
    params, opt_state = midst(make("wrapper"))
    carried = si_jax.carry_over(opt_state, into=make("link").init(params))
    moved = jax.tree.map(lambda x: x + 1, params)
    chex.assert_trees_all_equal(
        si_jax.synapses(si_jax.consolidate(carried, moved)).importance,
        si_jax.synapses(si_jax.consolidate(opt_state, moved)).importance,
    )


def test_a_link_becomes_a_wrapper_at_a_tasks_end_alone():
    """Its last step is not credited yet; under jit that is not seen, and ω is NaN."""
    params, opt_state = midst(make("link"))
    into = make("wrapper").init(params)
    with pytest.raises(ValueError, match="its last step is still to be credited"):
        si_jax.carry_over(opt_state, into=into)

    @jax.jit
    def carried(opt_state):
        return si_jax.synapses(si_jax.carry_over(opt_state, into=into)).path_integral

    assert all(np.isnan(x).all() for x in jax.tree.leaves(carried(opt_state)))
    rested = carried(si_jax.consolidate(opt_state, params))
    assert not any(x.any() for x in jax.tree.leaves(rested))


@forms
def test_elastic_weight_consolidation_beside_synaptic_intelligence(form):
    link = ewc.elastic_weight_consolidation(3.0)
    tx, other = make(form, optax.chain(link, ADAM)), make(form, optax.chain(link, SGD))
    params = init()
    fisher = jax.tree.map(lambda p: 1 + jnp.square(p), params)
    opt_state = ewc.consolidate(tx.init(params), params, fisher)
    _, opt_state = steps(tx, params, opt_state)
    into = other.init(larger(params))
    carried = si_jax.carry_over(opt_state, into=into)
    (state,) = [
        s
        for s in jax.tree.leaves(carried, is_leaf=lambda x: hasattr(x, "decay"))
        if hasattr(s, "decay")
    ]
    chex.assert_trees_all_equal(state.importance, larger_grads(fisher))
    chex.assert_trees_all_equal(state.reference, larger(params))
    far = jax.tree.map(lambda x: x + 1, params)
    np.testing.assert_allclose(
        si_jax.surrogate_loss(carried, larger(far)),
        si_jax.surrogate_loss(opt_state, far),
        rtol=1e-6,
    )


# --- A run that had no memory ---------------------------------------------------------


PLAIN = {
    "wrapper": (ADAM, make("wrapper", ADAM)),
    "link": (ADAM, make("link", ADAM)),
    "link in a chain": (
        lenient(optax.chain(optax.clip(1.0), optax.adam(0.01))),
        lenient(
            optax.chain(
                si_jax.synaptic_intelligence(STRENGTH, DAMPING),
                optax.clip(1.0),
                optax.adam(0.01),
            )
        ),
    ),
    "wrapper in MultiSteps": tuple(
        lenient(optax.MultiSteps(tx, 1).gradient_transformation())
        for tx in (ADAM, make("wrapper", ADAM))
    ),
    "links": (
        ADAM,
        lenient(
            optax.chain(
                optax.masked(
                    si_jax.synaptic_intelligence(STRENGTH, DAMPING),
                    {"kernel": True, "bias": False},
                ),
                ewc.elastic_weight_consolidation(1.0),
                ADAM,
            )
        ),
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_run_without_memory_goes_on_with_it(case):
    """Step by step as before; the path integral begins there."""
    plain, tx = PLAIN[case]
    params, opt_state = steps(plain, init(), plain.init(init()))
    into = tx.init(params)
    begun = si_jax.carry_over(opt_state, into=into)
    assert avals(begun) == avals(into)
    assert not pointers(begun) & pointers(opt_state, into)

    now, omega = params, 0.0
    for step in range(3):
        grads = grad(now, 1, step)
        updates, opt_state = plain.update(grads, opt_state, now)
        before, now = now, optax.apply_updates(now, updates)
        moved = np.float64(now["kernel"]) - before["kernel"]
        omega = omega - np.float64(grads["kernel"]) * moved
    after, begun = steps(tx, params, begun, task=1)
    chex.assert_trees_all_close(after, now, rtol=1e-6)
    far = np.float64(now["kernel"]) - params["kernel"]
    np.testing.assert_allclose(
        si_jax.synapses(si_jax.consolidate(begun, after)).importance["kernel"],
        np.maximum(omega / (far**2 + DAMPING), 0),
        rtol=1e-3,
        atol=1e-6,
    )


@forms
def test_a_run_without_memory_goes_on_in_nnx_and_under_jit(form):
    model = Model(init())
    old = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    old.update(model, nnx.grad(Model.loss)(model, 0, 0))
    new = nnx.Optimizer(model, make(form, ADAM), wrt=nnx.Param)
    carried = jax.jit(lambda s, t: si_jax.carry_over(s, into=t))(
        old.opt_state, new.opt_state
    )
    for name in ("count", "mu", "nu"):
        chex.assert_trees_all_equal(
            *(optax.tree.get(state, name) for state in (old.opt_state, carried))
        )
    new.opt_state = carried
    new.update(model, nnx.grad(Model.loss)(model, 0, 1))
    assert optax.tree.get(new.opt_state, "count")[...] == 2


@pytest.mark.parametrize(
    ("inner", "params"),
    [
        (optax.sgd(0.1, momentum=0.9), init()),
        (optax.chain(ADAM, optax.clip(1.0)), init()),
        (ADAM, larger(init())),
        (ADAM, init(jnp.bfloat16)),
    ],
    ids=["optimizer", "chain", "shapes", "dtype"],
)
@forms
def test_a_state_without_memory_must_be_that_of_the_inner_optimizer(
    form, inner, params
):
    into = make(form, ADAM).init(init())
    with pytest.raises(ValueError, match=r"no Synaptic.*fits if.*same optimizer"):
        si_jax.carry_over(lenient(inner).init(params), into=into)


# --- Containers -----------------------------------------------------------------------

PARTS = {"adapter": "new", "bias": "bias", "kernel": "rest"}
OPTAX = {
    "masked": lambda form: optax.chain(
        optax.masked(make(form), lambda p: jax.tree.map(lambda x: x.ndim == 1, p))
    ),
    "partition": lambda form: optax.partition(
        {"bias": make(form), "new": SGD, "rest": make(form, ADAM)},
        lambda params: {name: PARTS[name] for name in params},
    ),
    "MultiSteps": lambda form: optax.MultiSteps(
        make(form), 1
    ).gradient_transformation(),
}


@pytest.mark.parametrize("container", OPTAX)
@forms
def test_containers_of_optax(form, container):
    tx = lenient(OPTAX[container](form))
    params, opt_state = midst(tx)
    wanted = larger(params)
    carried = jax.jit(lambda s, p: si_jax.carry_over(s, into=tx.init(p)))(
        opt_state, wanted
    )
    far = jax.tree.map(lambda x: x + 1, params)
    penalty = si_jax.surrogate_loss(opt_state, far)
    assert penalty > 1e-3
    np.testing.assert_allclose(
        si_jax.surrogate_loss(carried, larger(far)), penalty, rtol=1e-6
    )
    steps(tx, wanted, si_jax.consolidate(carried, wanted), pad=larger_grads)


@forms
def test_linen_train_state(form):
    tx = make(form, ADAM)

    def state(width, params=None):
        model = linen.Dense(width)
        params = params or model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def grown(params):
        both = larger(params)
        return {name: both[name] for name in params}

    small = state(3)
    params, opt_state = midst(tx, small.params)
    small = small.replace(params=params, opt_state=opt_state)
    large = state(5, grown(small.params))
    large = large.replace(
        opt_state=si_jax.carry_over(small.opt_state, into=large.opt_state)
    )
    omega = si_jax.synapses(large.opt_state).importance
    chex.assert_trees_all_equal(
        {name: omega[name][..., :3] for name in omega},
        si_jax.synapses(opt_state).importance,
    )
    large.apply_gradients(grads=jax.tree.map(jnp.ones_like, large.params))


class Model(nnx.Module):
    def __init__(self, params):
        self.kernel, self.bias = nnx.Param(params["kernel"]), nnx.Param(params["bias"])

    def loss(self, *batch):
        kernel, bias = self.kernel[...][:, :3], self.bias[...][:3]
        return loss({"kernel": kernel, "bias": bias}, *batch)


@pytest.mark.parametrize(("form", "target"), [("link", "wrapper"), ("wrapper", "link")])
def test_nnx_optimizer(form, target):
    """A new optimizer for the model that grew."""

    @nnx.jit
    def step(model, optimizer, *batch):
        optimizer.update(model, nnx.grad(Model.loss)(model, *batch))

    model = Model(init())
    optimizer = nnx.Optimizer(model, make(form, ADAM), wrt=nnx.Param)
    for i in range(2):
        step(model, optimizer, 0, i)
        params = nnx.state(model, nnx.Param)
        optimizer.opt_state = si_jax.consolidate(optimizer.opt_state, params)
    old = nnx.to_pure_dict(params)
    far = jax.tree.map(lambda x: x + 1, params)
    penalty = si_jax.surrogate_loss(optimizer.opt_state, far)

    model = Model(larger(old))
    grown = nnx.Optimizer(model, make(target), wrt=nnx.Param)
    grown.opt_state = si_jax.carry_over(optimizer.opt_state, into=grown.opt_state)
    far = jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(
        si_jax.surrogate_loss(grown.opt_state, far), penalty, rtol=1e-5
    )
    assert penalty > 1e-3
    step(model, grown, 0, 2)


class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    adapter: jax.Array | None = None


@forms
def test_equinox_modules(form):
    tx = make(form, ADAM)
    params, opt_state = midst(tx)
    small = Layer(**params)
    opt_state = si_jax.add_importance(tx.init(small), jax.tree.map(jnp.square, small))
    carried = si_jax.carry_over(opt_state, into=tx.init(Layer(**larger(params))))
    expected = Layer(**larger_grads(jax.tree.map(jnp.square, params)))
    chex.assert_trees_all_equal(si_jax.synapses(carried).importance, expected)


# --- Arrays ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("target", FORMS)
@forms
def test_nothing_is_shared_so_that_either_state_can_be_donated(form, target, compiled):
    params, opt_state = ended(form, target, *midst(make(form, ADAM)))
    into = make(target, ADAM).init(params)
    carried = compiled(lambda s, t: si_jax.carry_over(s, into=t))(opt_state, into)
    mine = pointers(carried)
    assert len(mine) == len(jax.tree.leaves(carried))
    assert not mine & pointers(params, opt_state, into)


@forms
def test_arrays_lie_where_those_of_into_lie(form):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = make(form, ADAM)
    params, opt_state = midst(tx)
    wanted = larger(params)
    wanted["kernel"] = jnp.pad(wanted["kernel"], ((0, 0), (0, 1)))
    expected = si_jax.carry_over(opt_state, into=tx.init(wanted))
    specs = {"kernel": PartitionSpec(None, "x"), "bias": PartitionSpec()}
    specs["adapter"] = PartitionSpec("x")
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    into = tx.init(jax.device_put(wanted, shardings))
    carried = si_jax.carry_over(opt_state, into=into)
    chex.assert_trees_all_equal(carried, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(carried):
        if leaf.ndim:
            sharding = shardings[path[-1].key]
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
    # And back again, onto one device.
    alone = tx.init(jax.device_put(wanted, jax.devices()[1]))
    again = si_jax.carry_over(carried, into=alone)
    chex.assert_trees_all_equal(si_jax.synapses(again), si_jax.synapses(expected))
    for leaf in jax.tree.leaves(si_jax.synapses(again)):
        assert leaf.devices() == {jax.devices()[1]}


@forms
def test_narrow_states_are_rounded_and_widened(form):
    params, opt_state = midst(make(form))
    narrow = make(form, state_dtype="bfloat16").init(params)
    there = si_jax.carry_over(opt_state, into=narrow)
    assert avals(there) == avals(narrow)
    back = si_jax.carry_over(there, into=make(form).init(params))
    assert avals(back) == avals(opt_state)
    expected, actual = si_jax.synapses(opt_state), si_jax.synapses(back)
    chex.assert_trees_all_equal(actual.path_integral, expected.path_integral)
    chex.assert_trees_all_close(actual[1:], expected[1:], rtol=2**-8)


def test_under_vmap():
    tx = make("link")
    midsts = [midst(tx, jax.tree.map(lambda x, s=s: s * x, init())) for s in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *midsts)

    def carry(params, opt_state):
        return si_jax.carry_over(opt_state, into=tx.init(larger(params)))

    expected = [carry(*each) for each in midsts]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    chex.assert_trees_all_equal(jax.vmap(carry)(*stacked), expected)
    with pytest.raises(ValueError, match="batched"):
        si_jax.carry_over(stacked[1], into=tx.init(init()))


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel": jnp.ones((4, 2))},
            r"params\['kernel'\] has shape \(4, 3\) in opt_state, but \(4, 2\) in into"
            ": a parameter may grow along its axes",
        ),
        ({"kernel": jnp.ones((4, 3, 1))}, r"but \(4, 3, 1\) in into"),
        (
            {"bias": None},
            r"params\['bias'\] of shape \(3,\) is in opt_state, but not in into: what "
            "is remembered of it would be lost",
        ),
    ],
    ids=["shrank", "rank", "gone"],
)
@forms
def test_parameters_that_shrank_or_are_gone_are_named(form, change, message):
    tx = make(form)
    opt_state = tx.init(init())
    with pytest.raises(ValueError, match=message):
        si_jax.carry_over(opt_state, into=tx.init(init() | change))


def test_memories_must_find_a_place():
    params, tx = init(), make("link")
    elastic = ewc.elastic_weight_consolidation(1.0)
    both = optax.chain(tx, elastic).init(params)
    for opt_state, into, message in (
        (both, tx.init(params), "opt_state holds EWC 1 times and into 0 times"),
        (tx.init(params), elastic.init(params), "holds SI 1 times and into 0 times"),
        (
            ADAM.init(params),
            tx.init(params),
            "opt_state holds no Synaptic Intelligence",
        ),
        (tx.init(params), SGD.init(params), "into holds no Synaptic Intelligence"),
        (tx.init(params), [{"importance": 0, "reference": 0}], "into is made of dicts"),
    ):
        with pytest.raises(ValueError, match=message):
            si_jax.carry_over(opt_state, into=into)
