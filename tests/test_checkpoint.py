import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.engine.checkpoint import Checkpoints
from si_jax import sweep


def tree(value):
    sharding = NamedSharding(sweep.mesh(4), PartitionSpec("runs"))
    return {
        "sharded": jax.device_put(jnp.full((4, 1000), value), sharding),
        "count": jnp.int32(value),
        "half": jnp.full(3, value, jnp.bfloat16),
        "nested": (np.full(2, value, np.float32), {"flag": jnp.array(True)}),
    }


def like(value):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None)
        ),
        tree(value),
    )


def test_what_is_saved_comes_back_with_its_shardings(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.restore(like(0.0)) is None
    for step in (3, 5, 9):
        checkpoints.save(step, tree(step / 2))
    step, found = Checkpoints(tmp_path / "c").restore(like(0.0))
    assert step == 9
    jax.tree.map(np.testing.assert_array_equal, found, tree(4.5))
    assert found["sharded"].sharding == tree(0.0)["sharded"].sharding
    kept = sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    assert kept == ["5", "9"]


def damage(folder, how):
    files = [p for p in folder.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif how == "missing":
        largest.unlink()
    else:
        for file in files:
            file.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(float(step)))
    damage(tmp_path / "2", how)
    step, found = checkpoints.restore(like(0.0))
    assert step == 1
    assert found["count"] == 1
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    assert len(list(tmp_path.with_name(tmp_path.name + "-damaged").iterdir())) == 1
    checkpoints.save(2, tree(2.0))  # the run goes on from there
    assert checkpoints.restore(like(0.0))[0] == 2


def test_a_full_disk_costs_the_checkpoint_only(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1.0))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    checkpoints.save(2, tree(2.0))
    assert "No space left on device" in caplog.text
    assert checkpoints.restore(like(0.0))[0] == 1


WEIGHTS = {"net": {"w": jnp.arange(3.0), "b": jnp.ones(2)}, "count": jnp.int32(1)}


def changed(**net):
    return WEIGHTS | {"net": WEIGHTS["net"] | net}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (changed(w=jnp.ones(5)), r"net/w is float32 \(3,\) in it, float32 \(5,\) in"),
        (changed(w=jnp.ones(2)), r"net/w is float32 \(3,\) in it, float32 \(2,\) in"),
        (changed(w=jnp.ones(3, jnp.bfloat16)), r"float32 \(3,\) in it, bfloat16"),
        (changed(v=jnp.ones(1)), r"net/v is not there in it, float32 \(1,\) in what"),
        ({"net": WEIGHTS["net"]}, r"count is int32 \(\) in it, not there in what"),
        (changed(w=jnp.ones((0, 3))), r"net/w is float32 \(3,\) in it"),
        (changed(w=jax.random.key(0)), r"net/w is float32 \(3,\) in it, uint32"),
    ],
)
def test_a_checkpoint_of_another_tree_is_refused_and_stays(asked, message, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, WEIGHTS)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), asked)
    for like in (asked, abstract):
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.restore(like)
        assert str(tmp_path / "c" / "2") in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    step, found = checkpoints.restore(WEIGHTS)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, WEIGHTS)


def test_every_kind_of_leaf_comes_back(tmp_path):
    """Also those that the storage does not take, or that have no bytes of their own."""
    tree = {
        "empty": jnp.zeros((0, 3)),
        "empty words": np.zeros((2, 0), np.int32),
        "complex": jnp.array([1 + 2j, -3j], jnp.complex64),
        "int4": jnp.array([-8, 7, 1], jnp.int4),
        "keys": jax.random.split(jax.random.key(3), 4),
        "other key": jax.random.key(5, impl="rbg"),
        "scalar": np.float32(0.5),
        "number": 3,
        "none": (None, {}),
    }
    Checkpoints(tmp_path).save(1, tree)

    def plain(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    def abstract(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    for like in (tree, jax.tree.map(abstract, tree)):
        _, found = Checkpoints(tmp_path).restore(like)
        assert found.pop("number") == 3
        for name, x in found.items():
            if name != "none":
                assert (x.shape, x.dtype) == (tree[name].shape, tree[name].dtype)
                np.testing.assert_array_equal(plain(x), plain(tree[name]))
        assert found["none"] == (None, {})


def test_what_is_no_array_is_refused_before_anything_is_written(tmp_path):
    bad = {"net": {"w": jnp.ones(1), "name": "a"}}
    with pytest.raises(TypeError, match="net/name is a str"):
        Checkpoints(tmp_path / "c").save(1, bad)
    with pytest.raises(TypeError, match="net/name is a str"):
        Checkpoints(tmp_path / "c").restore(bad)
    assert not (tmp_path / "c").exists()


def test_a_step_that_is_not_above_the_newest_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, WEIGHTS)
    for step in (2, 1):
        with pytest.raises(ValueError, match=f"step {step} is not above the newest"):
            checkpoints.save(step, WEIGHTS)
    assert checkpoints.restore(WEIGHTS)[0] == 2
