"""The benchmark measures what it says; nothing here depends on how long it takes."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import si_jax
from experiments.benchmark import findings, steps
from experiments.benchmark.__main__ import RUNS, run
from experiments.benchmark.config import Config
from experiments.benchmark.runs import WAYS, table
from experiments.data.datasets import Examples
from experiments.engine import command, timing
from experiments.networks.models import MLP


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch here")
def test_the_peers_in_pytorch_compute_what_we_do():
    import torch

    from experiments.networks import torch_si

    rng = np.random.default_rng(0)
    images = rng.random((8, 784), np.float32)
    labels = rng.integers(0, 10, 8)
    after = {}
    for name in ("torch SI", "torch SI, careful"):
        torch.manual_seed(0)
        model = torch_si.mlp((5,))
        step = torch_si.METHODS[name](model)
        for _ in range(3):
            step(torch.tensor(images), torch.tensor(labels))
        after[name] = [p.detach().numpy() for p in model.parameters()]
    for usual, careful in zip(*after.values(), strict=True):
        np.testing.assert_allclose(usual, careful, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch here")
@pytest.mark.parametrize("name", steps.NETS)
def test_the_peers_have_our_networks(name):
    from experiments.networks import torch_si

    net = steps.NETS[name]
    params = net.model.init(jax.random.key(0), jnp.zeros((1, *net.image_shape)))
    theirs = torch_si.network(net.model).parameters()
    assert sorted(p.numel() for p in theirs) == sorted(
        x.size for x in jax.tree.leaves(params)
    )


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch here")
def test_a_whole_run_in_pytorch_remembers():
    from experiments.networks import torch_si

    rng = np.random.default_rng(0)
    labels = np.arange(400, dtype=np.int32) % 4
    images = rng.integers(0, 100, (400, 28, 28, 1), np.uint8)
    for label in range(4):
        images[labels == label, 7 * label : 7 * label + 7] += 100
    digits, mirrored = Examples(images, labels), Examples(images, labels ^ 1)
    test, train = torch_si.split_mnist(
        digits, mirrored, [(0, 1), (2, 3)], epochs=3, seed=0
    )
    np.testing.assert_allclose(test, 1 - train, atol=1e-6)
    assert train.shape == (2, 2)
    assert train[1].min() > 0.9


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="no PyTorch here")
def test_the_peer_in_pytorch_consolidates_by_equation_5():
    import torch

    from experiments.networks import torch_si

    torch.manual_seed(0)
    model = torch_si.mlp((5,))
    si = torch_si.PathIntegral(model, 1.0)
    step = torch_si.usual(model, si)
    for _ in range(3):
        step(torch.rand(8, 784), torch.randint(0, 10, (8,)))
    before = [[x.clone() for x in xs] for xs in (si.omega, si.reference)]
    si.consolidate(damping=0.1)
    for omega, ref, importance, p in zip(
        *before, si.importance, si.params, strict=True
    ):
        expected = omega / ((p.detach() - ref) ** 2 + 0.1)
        torch.testing.assert_close(importance, expected.clamp(min=0))
    for p, ref, omega in zip(si.params, si.reference, si.omega, strict=True):
        torch.testing.assert_close(p.detach(), ref)
        assert not omega.any()


def test_medians_compare_within_a_turn():
    times = {
        "adam": [1.0, 2.0, 4.0],
        "wrapper": [1.5, 3.0, 6.0],
        "torch adam": [2.0] * 3,
    }
    found = timing.medians(times)
    assert found["wrapper"]["ms"] == 3.0
    assert found["wrapper"]["to_plain"] == 1.5
    assert found["torch adam"]["to_plain"] == 1.0
    assert found["torch adam"]["to_wrapper"] == pytest.approx(0.667)


def test_methods_are_timed_where_synaptic_intelligence_pulls(tiny):
    params = tiny.model.init(jax.random.key(0), jnp.zeros((1, *tiny.image_shape)))
    for name, method in steps.methods(tiny).items():
        state = method.start(params)
        if name == "adam":
            with pytest.raises(ValueError, match="no Synaptic Intelligence"):
                si_jax.surrogate_loss(state, params)
        else:
            assert si_jax.surrogate_loss(state, params).shape == ()


def test_copies_are_those_of_whole_parameters():
    program = """%body (x: f32[4,2]) -> f32[4,2] {
  %a = f32[4,2]{1,0} copy(%x)
  %b = f32[2]{0} copy(%y), metadata={op_name="step"}
  %c = bf16[4,2]{1,0} copy(%x)
  %d = f32[64,2]{1,0} copy(%activations)
  %e = f32[] copy(%scalar)
}

ENTRY %main (x: f32[4,2]) -> f32[4,2] {
  %f = f32[4,2]{1,0} copy(%x)
}"""
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    assert timing.copies(program, params, in_loop=True) == 18 / 10
    assert timing.copies(program, params) == 26 / 10
    assert timing.copies(program.replace("[", "<"), params) is None


def test_an_option_is_asked_for_first():
    assert timing.compiles_with({})
    assert not timing.compiles_with({"no_such_option": True})


@pytest.fixture(scope="module")
def tiny():
    """A network of 1,000 parameters, in a loop and step by step."""
    return steps.Net(MLP((20,), 10), (6, 6, 1), batch_size=4, steps=3)


@pytest.mark.parametrize("loop", [True, False])
def test_a_program_takes_its_steps_and_says_what_it_moves(tiny, loop):
    net = tiny._replace(loop=loop)
    found = steps.methods(net)
    with jax.numpy_dtype_promotion("standard"):
        programs = {
            name: steps.training(net, found[name])
            for name in ("adam", "link", "kronecker")
        }
    facts = {name: program.facts for name, program in programs.items()}
    assert facts["adam"]["accessed"] < facts["link"]["accessed"]
    layers = (36, 20), (20, 10)
    parameters = sum(m * n + n for m, n in layers)
    factors = sum(m * m + n * n + m + 1 for m, n in layers)  # the last two: bias, T
    expected = 3 * parameters + factors + 2  # θ̃, Adam's; their scalars
    assert facts["kronecker"]["state_bytes"] == 4 * expected
    assert programs["adam"].steps == 3
    state = programs["adam"].run()
    assert optax.tree.get(state, "count") == 3


@pytest.fixture(scope="module")
def updates():
    """The programs of an update, of a tree of 4,096 parameters."""
    params = {str(i): jnp.full((32, 64), 0.1) for i in range(2)}
    with jax.numpy_dtype_promotion("standard"):
        return {
            name: steps.updating(params, method)
            for name, method in steps.methods().items()
        }


def test_facts_of_an_update(updates):
    facts = {name: program.facts for name, program in updates.items()}
    size = {name: x["state_bytes"] // 4096 for name, x in facts.items()}
    assert list(size.values())[:4] == [8, 8 + 12, 8 + 8, 8 + 20]
    assert list(size.values())[4:7] == [8 + 5, 8 + 8, 8 + 4]
    for name, x in facts.items():  # θ and the gradient besides
        assert x["peak_bytes"] >= (size[name] + 8) * 4096
        assert x["accessed"] >= size[name] + 8


def test_the_command(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.setitem(steps.NETS, "split MNIST", tiny)
    monkeypatch.setitem(steps.NETS, "permuted MNIST", tiny)
    monkeypatch.setitem(steps.NETS, "narrow MNIST", tiny)
    monkeypatch.setattr(steps, "torch_training", lambda _: {})
    monkeypatch.setattr(steps, "MATRIX", (32, 64))
    monkeypatch.setattr(steps, "PASS", 4)
    copied = functools.partial(timing.copy_bandwidth, 2**16)
    monkeypatch.setattr(steps, "copy_bandwidth", copied)
    some = {k: steps.methods()[k] for k in ("adam", "wrapper")}
    monkeypatch.setattr(steps, "methods", lambda _=None: some)
    config = Config(
        out=tmp_path,
        nets=("split MNIST", "narrow MNIST"),
        convolutions=False,
        runs=(2,),
        epochs=1,
        repetitions=2,
        large=5_000,
    )
    with jax.numpy_dtype_promotion("standard"):
        run(config)
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["runs"]) == [
        "split MNIST",
        "narrow MNIST",
        "split MNIST, step by step",
        "narrow MNIST, step by step",
        "boundary",
        "update",
        "narrow MNIST, boundary",
        "narrow MNIST, update",
        "large tree",
        RUNS,
    ]
    assert record["runs"]["large tree"]["parameters"] == 2 * 32 * 64
    seconds = record["runs"][RUNS]["seconds"]
    assert [(way, list(x)) for way, x in seconds.items()][:2] == [
        (w, ["2"]) for w in WAYS
    ]
    assert record["summary"].pop(RUNS) == {}
    printed = capsys.readouterr().out
    assert findings.table(record["summary"]) in printed
    assert table(seconds) in printed
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    for of_net in ("boundary", "narrow MNIST, boundary"):
        boundary = record["summary"].pop(of_net)
        assert boundary["second moment"]["to_plain"] > 0
        assert boundary["Kronecker, 4 examples"]["to_plain"] > 0
    for found in record["summary"].values():
        assert list(found) == list(some)
    for x in record["summary"]["large tree"].values():
        assert x["of_copy_bandwidth"] > 0


def test_shipped_configuration_is_the_default():
    assert command.parse(Config, "benchmark", []) == Config()
