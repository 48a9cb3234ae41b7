"""The benchmark measures what it says; nothing here depends on how long it takes."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import si_jax
from experiments import benchmark, command


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch here")
def test_the_peers_in_pytorch_compute_what_we_do():
    import torch

    from experiments import benchmark_torch

    rng = np.random.default_rng(0)
    images = rng.random((8, 784), np.float32)
    labels = rng.integers(0, 10, 8)
    after = {}
    for name in ("torch SI", "torch SI, careful"):
        torch.manual_seed(0)
        model = benchmark_torch.mlp((5,))
        step = benchmark_torch.METHODS[name](model)
        for _ in range(3):
            step(torch.tensor(images), torch.tensor(labels))
        after[name] = [p.detach().numpy() for p in model.parameters()]
    for usual, careful in zip(*after.values(), strict=True):
        np.testing.assert_allclose(usual, careful, rtol=1e-4, atol=1e-5)


def test_medians_compare_within_a_turn():
    times = {
        "adam": [1.0, 2.0, 4.0],
        "wrapper": [1.5, 3.0, 6.0],
        "torch adam": [2.0] * 3,
    }
    found = benchmark.medians(times)
    assert found["wrapper"]["ms"] == 3.0
    assert found["wrapper"]["to_adam"] == 1.5
    assert found["torch adam"]["to_adam"] == 1.0
    assert found["torch adam"]["to_wrapper"] == pytest.approx(0.667)


def test_methods_are_timed_where_synaptic_intelligence_pulls():
    params = {"w": jnp.ones((2, 2))}
    for name, method in benchmark.methods().items():
        state = method.start(params)
        if name == "adam":
            with pytest.raises(ValueError, match="no Synaptic Intelligence"):
                si_jax.synapses(state)
        else:
            assert si_jax.synapses(state).importance["w"].shape == (2, 2)


def test_the_command(tmp_path, capsys):
    config = benchmark.Config(
        out=tmp_path, nets=("split MNIST",), repetitions=2, large=5_000_000
    )
    with jax.numpy_dtype_promotion("standard"):
        benchmark.run(config)
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["runs"]) == ["split MNIST", "update", "large tree"]
    assert record["runs"]["large tree"]["parameters"] == 1024 * 4096
    assert benchmark.table(record["summary"]) in capsys.readouterr().out


def test_shipped_configuration_is_the_default():
    assert command.parse(benchmark.Config, "benchmark", []) == benchmark.Config()
