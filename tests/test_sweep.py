import jax
import jax.numpy as jnp
import numpy as np
import pytest

from si_jax import sweep


def walk(carry, i, keys, length):
    """Something random with a loop in it, like a run."""
    noise = jax.random.normal(keys[i], carry["x"].shape)
    return {"x": jax.lax.fori_loop(0, length, lambda _, x: x * 0.9 + noise, carry["x"])}


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 5, 9])
def test_runs_side_by_side_equal_runs_one_by_one(runs):
    keys = jax.random.split(jax.random.key(0), runs)
    carry = {"x": jnp.arange(runs * 3, dtype=jnp.float32).reshape(runs, 3)}
    mesh = sweep.mesh(runs)
    assert mesh.devices.size == min(runs, len(jax.local_devices()))
    length = sweep.replicate(jnp.int32(7), mesh)
    all_runs = sweep.over_runs(walk, mesh, mapped=2)
    own = sweep.spread((carry, np.arange(runs)), mesh)
    together = sweep.gather(all_runs(*own, keys, length), runs)
    for i in range(runs):
        alone = jax.jit(walk)({"x": carry["x"][i]}, i, keys, 7)
        np.testing.assert_array_equal(together["x"][i], alone["x"])


@pytest.mark.parametrize("max_parallel", [1, 2, 3, 64])
def test_a_grid_is_cut_into_batches(max_parallel):
    """Nine runs on four devices, so many of one device side by side."""

    def train(key, offset, scale, shift):
        return {"x": scale * offset + shift, "noise": jax.random.normal(key, (2,))}

    grid = {"scale": [1.0, 2.0, 3.0], "shift": [0.0, 10.0, 20.0]}
    result = sweep.sweep(
        train, jnp.float32(5), seeds=[7], max_parallel=max_parallel, **grid
    )
    expected = 5 * np.array(grid["scale"])[:, None] + np.array(grid["shift"])[None]
    np.testing.assert_array_equal(result["x"], expected[None])
    noise = jax.random.normal(jax.random.key(7), (2,))
    np.testing.assert_array_equal(result["noise"], np.broadcast_to(noise, (1, 3, 3, 2)))


def test_donation_reuses_the_first_argument_only():
    runs = sweep.over_runs(lambda x, y: x + y, sweep.mesh(4), mapped=2, donate=True)
    x, y = (runs(jnp.zeros(4), jnp.full(4, value)) for value in (1.0, 2.0))
    total = runs(x, y)
    assert x.is_deleted()
    assert not y.is_deleted()
    assert total.tolist() == [3.0] * 4


def test_a_sweep_of_nothing_is_refused():
    for seeds, strength, message in (
        ([], [1.0], "seeds must have one value"),
        ([0], [], "strength must have one value"),
        (range(0), (), "seeds, strength must have one value"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.sweep(lambda _, strength: strength, seeds=seeds, strength=strength)
