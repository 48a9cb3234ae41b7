"""The fine-tuning experiment's texts, methods and tables, on toy texts."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import si_jax
from experiments.data.texts import sha256, shipped
from experiments.engine import command
from experiments.engine.command import UserError
from experiments.finetune import __main__ as finetune
from experiments.finetune import (
    figures,
    findings,
    measures,
    merges,
    methods,
    study,
    texts,
)
from experiments.finetune.config import Config
from experiments.finetune.methods import Family
from experiments.training.loop import Carry
from si_jax import lora

TOY = {
    "seeds": 2,
    "width": 8,
    "layers": 1,
    "heads": 2,
    "length": 8,
    "batch_size": 4,
    "pretraining_steps": 16,
    "steps": 8,
    "third_steps": 8,
    "stops": 2,
    "evaluated": 6,
    "fisher_examples": 4,
    "cost_turns": 0,
    "methods": ("fine-tuning", "si"),
    "si_strengths": (0.1, 10.0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    found = {}
    for name, alphabet in (("old", b"ab "), ("new", b"12\n"), ("third", b"xyz")):
        found[name] = folder / name
        found[name].write_bytes(bytes(rng.choice(list(alphabet), 3000).tolist()))
    return found


def config(files, out, **settings):
    paths = {name: (path,) for name, path in files.items()}
    return Config(out=out, **(TOY | paths | settings))


def lookup(key):
    """A table of what follows each byte, which compiles in no time."""
    return {"table/of": 0.02 * jax.random.normal(key, (256, 256))}


def run(config):
    """With a table for a transformer."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        net = methods.Network(
            lookup, lambda p, text: p["table/of"][text.astype(jnp.int32)], False
        )
        for module in (methods, study, measures, merges):
            patch.setattr(module, "network", lambda *_: net)
        finetune.run(config)
    return json.loads((config.out / "results.json").read_text())


@pytest.mark.slow
def test_two_methods_from_start_to_finish(files, tmp_path, capsys):
    small = config(files, tmp_path)
    record = run(small)
    runs = record["runs"]
    assert set(runs) >= {"pretraining", "fine-tuning", "si c=0.1", "si c=10"}
    assert sum(name.endswith("then third") for name in runs) == 2
    assert np.shape(runs["fine-tuning"]["test"]) == (2, 2, 3)
    assert np.shape(runs["si c=10"]["choice"]) == (2, 1, 3)
    before = np.array(runs["pretraining"]["test"])[:, -1]
    for method in ("fine-tuning", "si c=0.1", "si c=10"):
        np.testing.assert_array_equal(runs[method]["initial"], before)
    third = next(x for x in runs if x.startswith("si") and x.endswith("third"))
    (arm, _) = third.split(", ")
    np.testing.assert_array_equal(
        runs[third]["initial"], np.array(runs[arm]["test"])[:, -1]
    )
    digests = [sha256(path.read_bytes()) for path in files.values()]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["sha256"] == (
        digests
    )
    weights, factors = len(small.merge_weights), len(small.merge_factors)
    assert np.shape(runs["fine-tuning, interpolated"]["test"]) == (2, weights, 3)
    assert np.shape(runs["fine-tuning, merged"]["choice"]) == (2, factors, 3)
    assert "si c=10, interpolated" in runs
    assert "si c=10, merged" not in runs
    assert {k: np.shape(x) for k, x in record["divergence"].items()} == {
        k: np.shape(runs[k]["test"])[:2]
        for k in runs
        if k != "pretraining" and not k.endswith("third")
    }
    printed = capsys.readouterr().out
    assert findings.best_table(small, runs) in printed
    assert findings.equal_table(small, runs) in printed
    assert findings.held_table(*record["held"].values()) in printed
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    again = run(small)
    assert again == record
    assert "Finished before" in capsys.readouterr().out
    files["new"].write_bytes(files["new"].read_bytes()[::-1])
    with pytest.raises(UserError, match=r"another configuration \(sha256"):
        run(small)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"old": None}, r"cannot read .*old: No such file"),
        ({"old": ""}, r"old is empty"),
        ({"new": "too short"}, r"the new text has 9 bytes, too few: 181 at least"),
        ({"old": "same" * 99, "new": "same" * 99}, r"old text and the new .* the same"),
        ({"third": "folder"}, r"cannot read .*third: Is a directory"),
    ],
)
def test_texts_that_will_not_do_are_named(content, message, tmp_path):
    for name in ("old", "new", "third"):
        text = content.get(name, f"{name} " * 99)
        if text == "folder":
            (tmp_path / name).mkdir()
        elif text is not None:
            (tmp_path / name).write_text(text)
    files = {name: tmp_path / name for name in ("old", "new", "third")}
    with pytest.raises(UserError, match=message):
        texts.load(config(files, tmp_path / "out"))


def test_any_bytes_are_a_text_and_two_are_enough(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode() + bytes(range(256)) * 2)
    files = {name: tmp_path / name for name in ("old", "new")}
    found = texts.load(config(files, tmp_path / "out"))
    assert list(found) == ["old", "new"]
    problem = texts.make_problem(list(found.values()), config(files, tmp_path))
    assert problem.train_tasks.shape == (2, 6)


def test_what_python_ships_is_three_texts():
    found = texts.load(Config())
    assert list(found) == ["old", "new", "third"]
    assert min(map(len, found.values())) == Config().text_bytes


def test_a_python_without_the_texts_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"does not ship the prose.*--old FILE"):
        shipped("prose")


def test_nothing_held_out_is_trained_on():
    contents = [bytes(range(250)) * 2, b"z" * 700]
    small = Config(**TOY)
    problem = texts.make_problem(contents, small)
    window = small.length + 1
    for i, content in enumerate(contents):
        begin, trained = problem.train.begin[i], problem.train.size[i]
        assert trained == len(content) - len(content) // 10
        choice, report = problem.train_tasks[i], problem.test_tasks[i]
        assert choice.min() >= begin + trained
        assert report.min() >= choice.max() + window
        assert report.max() + window <= begin + len(content)


def curves():
    """Fine-tuning at two stops, and three strengths, of two seeds."""

    def of(*points):
        return {half: [points, points] for half in ("test", "choice")}

    return {
        "pretraining": of((1.0, 4.0)),
        "fine-tuning": of((2.0, 3.0), (3.0, 2.0)),
        "si c=0.1": of((2.0, 2.0)),
        "si c=10": of((1.25, 3.0)),
    }


def test_interpolation_at_equal_loss():
    small = Config(**TOY)
    found = findings.at_equal_loss(small, curves(), (0.5, 0.75, 1.0))
    np.testing.assert_allclose(found["fine-tuning"], [[1, 1.5, 2]] * 2)
    np.testing.assert_allclose(found["si"], [[0.25, 0.625, 1]] * 2)
    lines = findings.equal_table(small, curves()).splitlines()
    assert lines[1].split()[:4] == ["early", "stopping", "1.000", "±"]


def test_a_slow_curve_ends_where_it_is_not_held():
    runs = curves()
    runs["slow c=0.1"] = {half: [[(1.5, 2.5)]] * 2 for half in ("test", "choice")}
    runs["slow si c=0.1"] = {half: [[(1.25, 3.0)]] * 2 for half in ("test", "choice")}
    small = Config(**TOY | {"methods": ("slow si",), "si_strengths": (0.1,)})
    found = findings.at_equal_loss(small, runs, (0.5, 0.75, 1.0))
    np.testing.assert_allclose(found["slow si"], [[0.25, 0.5, np.nan]] * 2)
    del runs["slow c=0.1"]
    found = findings.at_equal_loss(small, runs, (0.5, 0.75))
    np.testing.assert_allclose(found["slow si"], [[0.25, np.nan]] * 2)


def test_a_curve_of_held_adapters_ends_with_free_ones():
    runs = curves()
    runs["lora"] = {half: [[(2.0, 2.5)]] * 2 for half in ("test", "choice")}
    runs["lora si c=0.1"] = {half: [[(1.25, 3.0)]] * 2 for half in ("test", "choice")}
    small = Config(**TOY | {"methods": ("lora si",), "fisher_strengths": (0.1,)})
    found = findings.at_equal_loss(small, runs, (0.5, 0.75, 1.0))
    np.testing.assert_allclose(found["lora si"], [[0.25, 1.0, np.nan]] * 2)


def test_si_at_a_smaller_learning_rate(monkeypatch):
    small, slow = Config(**TOY), methods.families(Config())["slow si"]
    net = methods.Network(
        None, lambda table, text: table[text.astype(jnp.int32)], False
    )
    monkeypatch.setattr(methods, "network", lambda *_: net)
    problem = texts.make_problem([bytes(range(250)) * 2, b"z" * 700], small)
    stage = jax.tree.map(
        lambda x: x[0], texts.with_stages(problem, (1,), (4,), 1).stages
    )
    moved = []
    with (
        jax.numpy_dtype_promotion("standard"),  # optax's Adam promotes
        jax.numpy_rank_promotion("allow"),
    ):
        for rate in (1.0, slow.rate):
            params = jnp.zeros((256, 256))
            tx = methods.optimizer(small, slow.memory, 0.0, 0.1, rate)
            start = Carry(params, tx.init(params))
            make = methods.GoOn(small, slow.memory, False, rate)
            learner = make(jnp.float32(1), jnp.float32(0.1), start)
            end, _ = learner.epoch(start, problem.train, stage, jax.random.key(0))
            moved.append(end.params)
    np.testing.assert_allclose(moved[1], 0.1 * moved[0], atol=1e-6)
    assert np.abs(moved[1]).max() > 5e-5


def test_means_are_curves_of_their_own_and_the_best_strength_is_chosen():
    runs = curves()
    runs["fine-tuning, interpolated"] = {
        half: [[(1.5, 2.5)]] * 2 for half in ("test", "choice")
    }
    runs["si c=0.1, interpolated"] = {"choice": [[(1.1, 2.5)]] * 2} | {
        "test": [[(1.2, 2.5)]] * 2
    }
    runs["si c=10, interpolated"] = {"choice": [[(1.1, 3.5)]] * 2} | {
        "test": [[(1.0, 3.5)]] * 2
    }
    small = Config(**TOY)
    found = findings.at_equal_loss(small, runs, (0.5, 0.75, 1.0))
    # From (1, 4) by (1.5, 2.5) to (3, 2), where fine-tuning ends.
    title = "fine-tuning, interpolated"
    np.testing.assert_allclose(found[title], [[1 / 3, 0.5, 2]] * 2)
    # By the half to choose on c = 0.1 at all three; c = 10 learns half alone.
    labels = findings.averaged(small, runs)["si, interpolated"]
    best = findings.best_means(runs, labels, (0.5, 0.75, 1.0))
    assert [label.strength for label in best] == [0.1, 0.1, 0.1]
    np.testing.assert_allclose(
        found["si, interpolated"], [[0.2 * 2 / 3, 0.2, 1.0]] * 2, rtol=1e-6
    )
    assert "si, interpolated" in findings.equal_table(small, runs)


@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.3, 0.1)])
def test_the_law_is_that_of_smaller_rates(rates):
    """Plain fine-tuning forgets KL², a penalty a third of it at equal KL."""
    small = Config(
        **TOY | {"methods": ("fine-tuning", "slow", "si"), "slow_factors": rates}
    )

    def losses(*kl, share=1.0):
        return {"test": [[(1.0 + share * x**2, 3.0) for x in kl]] * 2}

    kl = {
        "fine-tuning": (2.0, 4.0),
        "slow c=0.1": (0.1,),
        "slow c=0.3": (1.0,),
        "si c=0.1": (2.0,),
        "si c=10": (0.5,),
        "si c=10, interpolated": (0.01, 0.2),  # the first is out of reach
    }
    runs = {"pretraining": {"test": [[(1.0, 4.0)]] * 2}} | {
        name: losses(*x, share=1 / 3 if name.startswith("si") else 1.0)
        for name, x in kl.items()
    }
    content = {"runs": runs, "divergence": {k: [x, x] for k, x in kl.items()}}
    found = findings.off_the_law(small, content)
    assert list(found) == ["fine-tuning", "si", "si, interpolated"]
    for name, ratio in found.items():
        expected = 1.0 if name == "fine-tuning" else 1 / 3
        np.testing.assert_allclose(ratio, [expected] * 2, rtol=1e-9)
    assert findings.off_the_law(small, {"runs": runs}) == {}
    line, *_ = findings.law_figure(small, content).axes[0].containers
    np.testing.assert_allclose(line[0].get_xdata(), [0.1, 1.0, 4.0])
    runs["si c=10"] = losses(0.5, share=-1.0)  # it gained
    assert np.isnan(findings.off_the_law(small, content)["si"]).all()


def test_networks_are_measured_as_they_were_evaluated(files, tmp_path):
    """A mean of weight 1 is the network itself, one of 0 the pretrained one."""
    whole = {name: path for name, path in files.items() if name != "third"}
    settings = {"methods": ("fine-tuning",), "third_steps": 0}
    small = config(whole, tmp_path, **settings)
    record = run(small)
    runs, table = record["runs"], lambda p, text: p["table/of"][text.astype(jnp.int32)]
    net = methods.Network(lookup, table, False)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        for module in (methods, study, measures, merges):
            patch.setattr(module, "network", lambda *_: net)
        contents = texts.load(small)
        digests = tuple(map(sha256, contents.values()))
        made = study.make_study(dataclasses.replace(small, sha256=digests), contents)
        base, end = (
            made.carry(x, range(2)).params for x in ("pretraining", "fine-tuning")
        )
        label = methods.Label("fine-tuning", role="interpolated")
        for weight, expected in ((0.0, "pretraining"), (1.0, "fine-tuning")):
            (mean,) = merges.averages(made, label, range(2), base, end, [weight], None)
            found = merges.losses(made, range(2), base, False, mean)
            for half in ("test", "choice"):
                np.testing.assert_allclose(
                    found[half], np.array(runs[expected][half])[:, -1], rtol=1e-6
                )
        np.testing.assert_allclose(
            found["divergence"], np.array(record["divergence"]["fine-tuning"])[:, -1]
        )
    assert (found["divergence"] > 0).all()


def test_where_networks_are_gone(files, tmp_path):
    """The pretrained are trained again; later seeds' means wait for earlier ones'."""
    whole = {name: path for name, path in files.items() if name != "third"}
    settings = {"third_steps": 0, "merge_weights": (0.5,), "merge_factors": ()}
    first = run(config(whole, tmp_path, **settings, seeds=1, methods=("fine-tuning",)))
    path = tmp_path / "results.json"
    record = json.loads(path.read_text())
    del record["divergence"], record["runs"]["fine-tuning, interpolated"]
    path.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "checkpoints")
    more = run(config(whole, tmp_path, **settings | {"si_strengths": (0.1,)}))
    for label in ("pretraining", "fine-tuning"):
        for part in ("test", "choice", "initial"):
            found = more["runs"][label][part]
            assert len(found) == 2
            assert found[:1] == first["runs"][label][part]
    assert "fine-tuning, interpolated" not in more["runs"]
    assert set(more["divergence"]) == {"si c=0.1", "si c=0.1, interpolated"}
    before = np.array(more["runs"]["pretraining"]["test"])[:, -1]
    np.testing.assert_array_equal(more["runs"]["si c=0.1"]["initial"], before)


@pytest.mark.parametrize("name", ["merge_weights", "merge_factors"])
def test_weights_of_means_rise(name):
    for values in ((0.5, 0.5), (0.0, 0.5), (-1.0,), (0.5, 0.1)):
        with pytest.raises(ValueError, match=f"{name} must rise between 0"):
            Config(**{name: values})
    Config(**{name: ()})


def test_the_best_is_chosen_on_the_half_that_is_there_for_it():
    runs = curves()

    def chosen():
        return {str(x): i for x, i in findings.choose(Config(**TOY), runs).values()}

    assert chosen() == {"fine-tuning": 0, "si c=0.1": 0}
    runs["si c=10"]["choice"] = [[(1.0, 1.0)]] * 2
    assert chosen() == {"fine-tuning": 0, "si c=10": 0}
    runs["si c=10"]["choice"] = [[(1.0, 1.0)], [(np.nan, 1.0)]]  # a seed diverged
    assert chosen() == {"fine-tuning": 0, "si c=0.1": 0}
    runs["si c=0.1"]["choice"] = [[(np.nan, np.nan)]] * 2
    with pytest.raises(UserError, match="si diverged in all that was tried"):
        chosen()


def test_what_learns_less_has_no_loss_at_that_level():
    assert np.isnan(findings._crossing(np.array([4.0, 3.5]), np.zeros(2), 3.0))
    assert findings.cells(np.array([1.0, np.nan])) == "diverged"


def test_shipped_configurations_parse():
    assert command.parse(Config, "finetune", []) == Config()
    quick = str(command.CONFIGS / "finetune_quick.toml")
    assert command.parse(Config, "finetune", ["--config", quick]) != Config()


def test_a_network_with_adapters_begins_as_the_one_without():
    small = Config(**TOY)
    net, adapted = methods.network(small), methods.network(small, lora_rank=2)
    text = jnp.arange(8, dtype=jnp.uint8)

    @jax.jit
    def both(keys):
        base, adapters = net.init(keys[0]), adapted.init(keys[1])
        logits = net.apply(base, text), adapted.logits(base)(adapters, text)
        return adapters, *logits

    adapters, *logits = both(jax.random.split(jax.random.key(0)))
    np.testing.assert_array_equal(*logits)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 2 * 8 * (4 + 2 + 5 + 5)


def test_adapters_products_are_held_by_what_the_kernels_beside_them_need():
    small = Config(**TOY)

    @jax.jit
    def found(key):
        base = methods.network(small).init(key)
        adapters = methods.network(small, small.lora_rank).init(key)
        leaves, treedef = jax.tree.flatten(base)
        needed = [jnp.full_like(x, i) for i, x in enumerate(leaves)]
        needed = jax.tree.unflatten(treedef, needed)
        state = methods.optimizer(small, "si product", 2.0, 0.1).init(adapters)
        held = methods.kernels(needed, state)
        away = jax.tree.map(lambda x: x + 0.1, adapters)
        state = lora.consolidate(state, adapters, held)
        return si_jax.surrogate_loss(state, away), away, needed

    penalty, away, needed = found(jax.random.key(0))
    expected = 0.0
    for name in ("attend", "gather", "widen", "narrow"):
        pair, beside = (tree["blocks"][0][name] for tree in (away, needed))
        product = pair["lora"]["lora_a"][...] @ pair["lora"]["lora_b"][...]
        expected += 2.0 * jnp.sum(beside["kernel"][...] * product**2)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


@pytest.mark.slow
def test_adapters_held_by_their_product_from_start_to_finish(files, tmp_path):
    arms = {"methods": ("lora si product",), "fisher_strengths": (0.0, 1e6)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        finetune.run(config(files, tmp_path, seeds=1, **arms))
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    before = np.array(runs["pretraining"]["test"])[:, -1]
    free, held = (runs[f"lora si product c={c}"] for c in ("0", "1e+06"))
    np.testing.assert_allclose(held["initial"], before, rtol=1e-5)
    moved = [np.abs(np.array(x["test"])[:, -1] - before).max() for x in (free, held)]
    assert moved[1] < 0.2 * moved[0]
    assert sum(name.endswith("then third") for name in runs) == 1


def test_every_family_has_its_arms():
    found = methods.arms("si", Family("si", None, (0.1, 1.0)))
    assert [str(arm) for arm in found] == ["si c=0.1", "si c=1"]
    assert [str(arm) for arm in methods.arms("mixed", Family(mixed=True))] == ["mixed"]


def test_what_is_held_by_a_run_that_diverged_is_no_number():
    layer = {"parameters": 1.0, "importance": None, "penalty": 0.0, "displacement": 0.1}
    assert findings.held_table({"head": layer}).splitlines()[1].split() == [
        *("head", "100.0%", "diverged", "0.0%", "0.1000")
    ]


def test_every_method_is_drawn_however_many_there_are():
    names = [f"method {i}" for i in range(40)]
    means = [f"{name}, interpolated" for name in names]
    points = {name: [[[0.1, 0.01], [1.0, 0.2]]] for name in (*names, *means)}
    law = figures.law(points, labels=["KL", "growth"], suptitle="")
    frontier = figures.frontier(points, start=[[3.0, 1.0]], labels=["new", "old"])
    for figure, more in ((law, 0), (frontier, 1)):
        assert len(figure.axes[0].containers) == 80 + more
