import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from si_jax import sweep
from si_jax.checkpoint import Checkpoints


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
