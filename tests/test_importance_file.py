"""Importances as files of safetensors: what is saved is loaded, or refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import si_jax
from si_jax import importance

TREE = {
    "layer": {
        "kernel": jnp.arange(6.0).reshape(2, 3),
        "bias": jnp.array([0.1, 3.0], jnp.bfloat16),
    },
    "scale": jnp.float32(2),
}


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors")
    return tmp_path / "fisher.safetensors"


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_saved_is_loaded_with_what_it_says_of_itself(path):
    importance.save(path, TREE, kind="Fisher", count=1000)
    tree, about = importance.load(str(path), jax.eval_shape(lambda: TREE))
    assert_same(tree, TREE)
    assert about == {"kind": "Fisher", "count": "1000"}


def test_names_are_paths_and_the_file_is_like_anybodys(path):
    importance.save(path, TREE)
    with sys.modules["safetensors"].safe_open(path, "np") as file:
        assert set(file.keys()) == {"layer/kernel", "layer/bias", "scale"}
        np.testing.assert_array_equal(
            file.get_tensor("layer/kernel"), TREE["layer"]["kernel"]
        )


def test_arrays_in_any_order_and_a_tree_that_is_one_array(path):
    for kernel in (np.asfortranarray(TREE["layer"]["kernel"]), jnp.ones((3, 2)).T):
        importance.save(path, kernel)
        tree, about = importance.load(path, jnp.zeros((2, 3)))
        np.testing.assert_array_equal(tree, kernel)
        assert about == {}


def test_a_module_of_nnx_takes_what_another_computed(path):
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    squares = jax.tree.map(jnp.square, params)
    importance.save(path, squares)
    tree, _ = importance.load(path, params)
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), 1.0)
    opt_state = si_jax.add_importance(tx.init(params), tree)
    assert_same(si_jax.synapses(opt_state).importance, squares)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"layer": TREE["layer"]}, "has what is not in like: scale"),
        ({**TREE, "head": jnp.ones(2)}, "has no head"),
        ({**TREE, "scale": jnp.ones(2)}, r"scale with shape \(\), .* it is \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(path, like, message):
    importance.save(path, TREE)
    with pytest.raises(ValueError, match=message):
        importance.load(path, like)


@pytest.mark.parametrize(
    ("bad", "message"), [(-1.0, "negative"), (np.nan, "not finite")]
)
def test_what_is_no_importance_is_neither_saved_nor_loaded(path, bad, message):
    bad = {"w": jnp.array([1.0, bad])}
    with pytest.raises(ValueError, match=rf"importance\['w'\] is {message}"):
        importance.save(path, bad)
    assert not path.exists()
    save_file = sys.modules["safetensors.numpy"].save_file
    save_file({"w": np.asarray(bad["w"])}, path)
    with pytest.raises(ValueError, match=rf"importance\['w'\] is {message}"):
        importance.load(path, bad)


def test_without_safetensors_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: importance.save(tmp_path / "x", TREE),
        lambda: importance.load(tmp_path / "x", TREE),
    ):
        with pytest.raises(ImportError, match=r"pip install .si_jax\[safetensors\]"):
            call()
