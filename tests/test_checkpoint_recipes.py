"""The guide on checkpoints: what was saved trains on as if it had not been."""

import re
from pathlib import Path

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from jax import export
from problem import FORMS, OPTIMIZERS, grad, init, lenient

import si_jax

PAGE = Path(__file__).parent.parent / "docs/guides/checkpoints.md"
ADAM = OPTIMIZERS["adam"]

forms = pytest.mark.parametrize("form", FORMS)


def make(form, inner=ADAM):
    return FORMS[form](inner, 0.5, 0.01)


def guide(definition):
    """What the guide's block that holds this text defines."""
    blocks = re.findall(r"^```py\w*\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (code,) = (code for code in blocks if definition in code)
    names = {"print": lambda *_: None}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "guide", "exec"), names)
    return names


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, *like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *like)


def trained(tx, params, opt_state, task=0, steps=4):
    for step in range(steps):
        grads = grad(params, task, step)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def after_a_task(tx):
    params, opt_state = trained(tx, init(), tx.init(init()))
    return params, si_jax.consolidate(opt_state, params)


def assert_trains_alike(tx, params, actual, expected):
    """Both lead to the same place, where a state without a memory does not lead."""
    ends = [trained(tx, params, s, 1)[0] for s in (actual, expected, tx.init(params))]
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)
    assert jnp.abs(ends[0]["kernel"] - ends[2]["kernel"]).max() > 1e-4


def grown(params):
    """More inputs: the kernel's new rows are behind the old, and no zeros."""
    kernel = jnp.concatenate([params["kernel"], jnp.full((2, 3), 0.5)])
    return params | {"kernel": kernel}


@forms
def test_a_network_that_grew_is_restored_in_its_old_shapes(form, tmp_path):
    tx = make(form)
    params, opt_state = after_a_task(tx)
    save(tmp_path / "1", {"params": params, "opt_state": opt_state})
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(tmp_path / "1").item_metadata["params"]
    old = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), saved)
    old = restore(tmp_path / "1", {"params": old, "opt_state": tx.init(old)})
    into = tx.init(grown(old["params"]))
    actual = si_jax.synapses(si_jax.carry_over(old["opt_state"], into=into))
    memory = si_jax.synapses(opt_state)
    assert memory.importance["kernel"].max() > 0
    for name, new in (("importance", 0.0), ("path_integral", 0.0), ("reference", 0.5)):
        kernel = getattr(actual, name)["kernel"]
        np.testing.assert_array_equal(kernel[:4], getattr(memory, name)["kernel"])
        np.testing.assert_array_equal(kernel[4:], np.full((2, 3), new, "f"))


def test_a_mask_that_changed_is_restored_as_it_was(tmp_path):
    def masked(**mask):
        return optax.chain(optax.masked(make("link", optax.identity()), mask), ADAM)

    tx = masked(kernel=True, bias=False)
    params, opt_state = after_a_task(tx)
    save(tmp_path / "1", opt_state)
    old = restore(tmp_path / "1", tx.init(init()))
    wider = masked(kernel=True, bias=True)
    carried = si_jax.carry_over(old, into=wider.init(params))
    memory, expected = si_jax.synapses(carried), si_jax.synapses(opt_state)
    np.testing.assert_array_equal(
        memory.importance["kernel"], expected.importance["kernel"]
    )
    assert not memory.importance["bias"].any()
    np.testing.assert_array_equal(memory.reference["bias"], params["bias"])
    assert_trains_alike(
        wider, params, carried, si_jax.carry_over(opt_state, into=wider.init(params))
    )
    with pytest.raises(ValueError, match=r"params\['kernel'\].*would be lost"):
        si_jax.carry_over(old, into=masked(kernel=False, bias=True).init(params))


@forms
def test_the_memory_saved_alone_goes_into_another_optimizer(form, tmp_path):
    tx, other = make(form), make("wrapper", optax.sgd(0.05))
    alone = si_jax.with_synaptic_intelligence(optax.identity())
    params, opt_state = after_a_task(tx)
    memory = si_jax.carry_over(opt_state, into=alone.init(params))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in jax.tree.leaves(memory)) <= 3 * size + 9
    save(tmp_path / "1", memory)
    memory = restore(tmp_path / "1", alone.init(init()))
    into = other.init(params)
    assert_trains_alike(
        other,
        params,
        si_jax.carry_over(memory, into=into),
        si_jax.carry_over(opt_state, into=into),
    )


def test_the_memory_of_a_part_is_saved_alone_under_the_same_mask(tmp_path):
    mask = {"kernel": True, "bias": False}
    tx = optax.chain(optax.masked(make("link", optax.identity()), mask), ADAM)
    alone = si_jax.with_synaptic_intelligence(optax.identity())
    params, opt_state = after_a_task(tx)
    save(
        tmp_path / "1",
        si_jax.carry_over(opt_state, into=optax.masked(alone, mask).init(params)),
    )
    memory = restore(tmp_path / "1", optax.masked(alone, mask).init(init()))
    carried = si_jax.carry_over(memory, into=tx.init(params))
    assert_trains_alike(
        tx, params, carried, si_jax.carry_over(opt_state, into=tx.init(params))
    )


def test_the_memory_is_restored_alone_from_a_whole_checkpoint(tmp_path):
    tx = make("wrapper")
    alone = si_jax.with_synaptic_intelligence(optax.identity())
    params, opt_state = after_a_task(tx)
    save(tmp_path / "1", {"params": params, "opt_state": opt_state})
    target = {"opt_state": {"synapses": si_jax.synapses(alone.init(params))}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        part = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        found = checkpointer.restore(tmp_path / "1", args=part)["opt_state"]
    memory = alone.init(params)._replace(**found)
    chex.assert_trees_all_equal(si_jax.synapses(memory), si_jax.synapses(opt_state))


def by_orbax(opt_state, folder):
    save(folder / "1", opt_state)
    return restore(folder / "1")


def by_msgpack(opt_state, _):
    packed = flax.serialization.to_bytes(opt_state)
    return flax.serialization.msgpack_restore(packed)


@pytest.mark.parametrize("untyped", [by_orbax, by_msgpack])
@forms
def test_a_state_without_types_is_filled_in_by_name(form, untyped, tmp_path):
    tx, names = make(form), guide("def by_name")
    params, opt_state = after_a_task(tx)
    tree = untyped(opt_state, tmp_path)
    restored = names["filled"](tx.init(params), names["by_name"](tree))
    chex.assert_trees_all_equal(restored, opt_state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    assert_trains_alike(tx, params, restored, opt_state)
    order = map(np.shape, jax.tree.leaves(tree))
    assert list(order) != list(map(np.shape, jax.tree.leaves(opt_state)))


def test_numpy_leaves_become_jax_arrays_before_they_are_trained_with():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init())
    tx = lenient(make("wrapper"))
    _, opt_state = tx.update(params, tx.init(params), params)
    packed = flax.serialization.to_bytes(opt_state)
    restored = flax.serialization.from_bytes(tx.init(params), packed)
    restored = jax.tree.map(jnp.asarray, restored)
    expected, _ = tx.update(params, opt_state, params)
    chex.assert_trees_all_equal(tx.update(params, restored, params)[0], expected)


def test_nnx_model_and_optimizer(tmp_path):
    def started():
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, make("wrapper"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, params))

    pair = model, optimizer = started()
    cached = nnx.cached_partial(step, *pair)
    cached()
    params = nnx.state(model, nnx.Param)
    opt_state = si_jax.consolidate(optimizer.opt_state, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    save(tmp_path / "1", nnx.state(pair))
    saved = nnx.to_pure_dict(nnx.state(pair))
    cached()
    later = nnx.to_pure_dict(nnx.state(pair))

    for target, go_on in ((pair, cached), (new := started(), lambda: step(*new))):
        nnx.update(target, restore(tmp_path / "1", nnx.state(target)))
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(target)), saved)
        go_on()
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(target)), later)


STATES = [
    si_jax.Synapses,
    si_jax.SynapticIntelligenceState,
    si_jax.WithSynapticIntelligenceState,
    si_jax.ewc.ElasticWeightConsolidationState,
    si_jax.Diagnosis,
]


@pytest.mark.parametrize("state", STATES)
def test_the_states_are_registered_for_jax_export(state):
    with pytest.raises(ValueError, match=f"si_jax.{state.__name__}"):
        export.register_namedtuple_serialization(state, serialized_name="another")


def test_a_compiled_step_comes_back_from_a_file():
    names = guide("export.export")
    tx, params = lenient(names["tx"]), names["params"]
    state = tx.init(params)
    exported = export.deserialize(names["file"]).call(params, state, params)
    chex.assert_trees_all_close(exported, tx.update(params, state, params))


def test_weights_of_pytorch():
    """Against its layers by hand: sums over windows, features in the order C, H, W."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(4, (3, 3), padding="VALID", name="conv")(x)
            x = linen.LayerNorm(name="norm")(x)
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            return linen.Dense(2, name="head")(x)

    rng = np.random.default_rng(0)
    shapes = {
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "head.weight": (2, 24),
        "head.bias": (2,),
    }
    named = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    image = rng.normal(size=(1, 3, 5, 4))
    conv = np.empty((1, 4, 3, 2))
    for i in range(3):
        for j in range(2):
            window = image[:, :, i : i + 3, j : j + 3]
            conv[:, :, i, j] = np.einsum("bchw,ochw->bo", window, named["conv.weight"])
    conv += named["conv.bias"][None, :, None, None]
    mean, variance = conv.mean(1, keepdims=True), conv.var(1, keepdims=True)
    x = (conv - mean) / np.sqrt(variance + 1e-6)
    x = x * named["norm.weight"][None, :, None, None]
    x = (x + named["norm.bias"][None, :, None, None]).reshape(1, -1)
    expected = x @ named["head.weight"].T + named["head.bias"]

    single = {name: x.astype("f") for name, x in named.items()}
    params = guide("def from_torch")["from_torch"](single)
    x = jnp.asarray(image.transpose(0, 2, 3, 1).astype("f"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        actual = Net().apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
