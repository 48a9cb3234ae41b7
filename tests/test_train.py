"""Runs in a small world whose right answers are known."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import lenient

import si_jax
from experiments.data import tasks
from experiments.data.datasets import Examples
from experiments.data.tasks import mask_logits
from experiments.engine import driver, progress
from experiments.engine.command import Options, UserError
from experiments.engine.record import Record
from experiments.engine.run import Label, Problem, Run
from experiments.networks.models import MLP
from experiments.training.boundaries import (
    consolidate,
    consolidate_fisher,
    consolidate_kronecker,
    kronecker_factors,
    merge,
    reset,
)
from experiments.training.classifier import learner
from experiments.training.loop import (
    Carry,
    Learner,
    correlations,
    epoch_key,
    init_key,
    permutations_key,
    remembering,
    train,
)
from si_jax import ewc, kronecker, metrics, sweep

EPOCHS = 4
GROUPS = [(0, 1), (2, 3)]
MODEL = MLP((16,), 4)


def blobs(count, seed):
    """Four noisy patterns of 3 × 3 pixels, a class each."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(0).integers(0, 200, (4, 3, 3, 1))
    labels = rng.integers(0, 4, count).astype(np.int32)
    noise = rng.integers(0, 56, (count, 3, 3, 1))
    return Examples((patterns[labels] + noise).astype(np.uint8), labels)


TRAIN, TEST = blobs(151, 1), blobs(83, 2)
TRAIN_TASKS, TEST_TASKS = (
    tasks.split_classes(e.labels, GROUPS, 4) for e in (TRAIN, TEST)
)


def compiled(pieces):
    return Learner(*map(jax.jit, pieces))


def plain(strength=0.3, *, inner=None, batch_size=16, fresh=True, **more):
    inner = inner or lenient(optax.adam(0.01))
    tx = si_jax.with_synaptic_intelligence(inner, strength, 0.01)
    boundary = [consolidate, reset(tx)] if fresh else [consolidate]
    more = {"batch_size": batch_size, "boundary": boundary} | more
    return learner(MODEL, tx, (3, 3, 1), **more)


def make(*args, **kwargs):
    return compiled(plain(*args, **kwargs))


def run(key, strength=0.3, **kwargs):
    pieces = plain(strength, **kwargs)
    return train(pieces, key, TRAIN, TEST, TRAIN_TASKS, TEST_TASKS, epochs=EPOCHS)


def on_device(examples):
    return Examples(*map(jnp.asarray, examples))


def test_separable_tasks_are_learned():
    result = jax.jit(run)(jax.random.key(0))
    assert result.test.shape == result.train.shape == (2, 2)
    assert result.epochs.loss.shape == (2, EPOCHS)
    assert metrics.learning_accuracy(result.test) > 0.97
    assert (np.diff(result.epochs.loss) < 0).all()


def test_an_epoch_is_one_pass_in_batches_the_last_one_smaller():
    """Against a plain loop over the same order; 70 examples by 24.

    The padding points at row 0, whose class is masked: its loss is infinite. Without
    jit nothing simplifies the product with 0 that would hide it.
    """
    train = Examples(TRAIN.images[1:], TRAIN.labels[1:])
    pieces = learner(MODEL, optax.sgd(0.5), (3, 3, 1), batch_size=24, boundary=[])
    key = jax.random.key(3)
    carry = pieces.init(key)
    first = tasks.split_classes(train.labels, GROUPS, 4)
    task = jax.tree.map(lambda x: x[0], first)
    size = int(task.size)
    assert size % 24 != 0
    assert size < len(task.rows)
    assert not task.classes[train.labels[0]]
    order = np.asarray(tasks.shuffle(task, key))[:size]

    def loss(params, rows):
        images = jnp.asarray(train.images)[rows].astype(jnp.float32) / 255
        logits = mask_logits(MODEL.apply(params, images), task.classes)
        labels = jnp.asarray(train.labels)[rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    params, total = carry.params, 0.0
    for start in range(0, size, 24):
        rows = order[start : min(start + 24, size)]
        value, grads = value_and_grad(params, rows)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        total += float(value) * len(rows)
    with jax.disable_jit():
        after, report = pieces.epoch(carry, on_device(train), task, key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after.params,
        params,
    )
    np.testing.assert_allclose(report.loss, total / size, rtol=1e-5)


@pytest.mark.parametrize("part", [0, 8])
def test_evaluate_counts_each_example_of_a_task_once(part):
    pieces = make(micro_batch=part)
    carry = pieces.init(jax.random.key(1))
    logits = MODEL.apply(carry.params, jnp.asarray(TEST.images, jnp.float32) / 255)
    for group, actual in zip(
        GROUPS, pieces.evaluate(carry, on_device(TEST), TEST_TASKS), strict=True
    ):
        rows = np.isin(TEST.labels, group)
        guess = np.asarray(logits)[rows][:, group].argmax(-1) + group[0]
        np.testing.assert_allclose(actual, (guess == TEST.labels[rows]).mean())


def test_a_run_is_a_function_of_its_seed():
    once, again, other = (jax.jit(run)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert (once.epochs.loss != other.epochs.loss).any()


def test_consolidation_holds_what_fine_tuning_forgets():
    """Task 2 is task 1 with its pixels permuted, on the same outputs."""
    order = np.random.default_rng(3).permutation(9)
    permuted = TRAIN.images.reshape(-1, 9)[:, order].reshape(-1, 3, 3, 1)
    examples = [on_device(TRAIN), on_device(Examples(permuted, TRAIN.labels))]
    every = tasks.split_classes(TRAIN.labels, [range(4)], 4)
    task = jax.tree.map(lambda x: x[0], every)

    @jax.jit
    def retained(strength):
        pieces = make(strength, inner=lenient(optax.adam(0.03)))
        carry = pieces.init(jax.random.key(0))
        for number, current in enumerate(examples):

            def one_epoch(carry, i, current=current, number=number):
                key = epoch_key(jax.random.key(0), number, i)
                return pieces.epoch(carry, current, task, key)

            carry, _ = jax.lax.scan(one_epoch, carry, jnp.arange(40))
            end = jax.random.key(1)
            carry = pieces.finish(carry, current, task, end)
        return [pieces.evaluate(carry, e, every)[0] for e in examples]

    (kept, learned), (forgotten, _) = retained(jnp.float32(1)), retained(jnp.float32(0))
    assert kept > 0.98
    assert learned > 0.98
    assert forgotten < 0.9


@pytest.mark.parametrize("fresh", [True, False])
def test_finish_resets_the_optimizer_or_keeps_it(fresh):
    pieces = make(fresh=fresh)
    carry = pieces.init(jax.random.key(0))
    task = jax.tree.map(lambda x: x[0], TRAIN_TASKS)
    carry, _ = pieces.epoch(carry, on_device(TRAIN), task, jax.random.key(1))
    steps = -(-int(task.size) // 16)
    assert optax.tree.get(carry.opt_state, "count") == steps
    finished = pieces.finish(carry, on_device(TRAIN), task, jax.random.key(2))
    assert optax.tree.get(finished.opt_state, "count") == (0 if fresh else steps)
    assert (
        si_jax.synapses(finished.opt_state)
        .importance["params"]["Dense_0"]["kernel"]
        .any()
    )


@pytest.fixture(scope="module")
def single():
    """Runs of three seeds, one by one."""
    alone = [jax.jit(run)(jax.random.key(seed)) for seed in range(3)]
    return jax.tree.map(lambda *x: np.stack(x), *alone)


def agree(test, train, loss, single):
    np.testing.assert_allclose(test, single.test, atol=0.03)
    np.testing.assert_allclose(train, single.train, atol=0.03)
    np.testing.assert_allclose(loss, single.epochs.loss, rtol=1e-3)


def test_vmap_and_pmap_equal_single_runs(single):
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    ways = [jax.jit(jax.vmap(run))]
    if jax.local_device_count() >= len(keys):
        ways.append(jax.pmap(run))
    for together in (way(keys) for way in ways):
        agree(together.test, together.train, together.epochs.loss, single)


PROBLEM = Problem(TRAIN, TEST, TRAIN_TASKS, TEST_TASKS)


def a_run(make, *, seeds=(0,), epochs=EPOCHS, method="si", problem=PROBLEM, **settings):
    """With the hyperparameters among the settings."""
    own = {field.name for field in dataclasses.fields(Run)}
    values = {k: x for k, x in settings.items() if k not in own}
    settings = {k: x for k, x in settings.items() if k in own}
    label = Label(method)
    return Run(label, make, lambda: problem, seeds, epochs, values, **settings)


@pytest.mark.parametrize("max_parallel", [1, 2])
def test_the_driver_equals_single_runs(max_parallel, tmp_path, single):
    record = Record("blobs", Options(out=tmp_path, max_parallel=max_parallel))
    result = progress.results(a_run(make, seeds=range(3), strength=0.3), record)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    loss = np.stack([json.loads(line)["loss"] for line in lines], axis=1)
    agree(result["test"], result["train"], loss.reshape(3, 2, EPOCHS), single)
    np.testing.assert_allclose(result["initial"], single.initial)


def test_a_grid_is_swept_in_one_program():
    """Bit for bit."""

    def point(key, examples, strength):
        pieces = plain(strength)
        return train(
            pieces, key, examples, TEST, TRAIN_TASKS, TEST_TASKS, epochs=EPOCHS
        )

    grid = sweep.sweep(point, on_device(TRAIN), seeds=[0, 5], strength=[0.0, 0.3, 3.0])
    assert grid.test.shape == (2, 3, 2, 2)
    alone = jax.jit(run)
    for i, seed in enumerate([0, 5]):
        for j, strength in enumerate([0.0, 0.3, 3.0]):
            single = alone(jax.random.key(seed), strength)
            np.testing.assert_array_equal(grid.test[i, j], single.test)
            np.testing.assert_array_equal(grid.epochs.loss[i, j], single.epochs.loss)


def test_epochs_report_what_synaptic_intelligence_sees():
    pieces = make(30.0, inner=optax.sgd(0.05), fresh=False)
    epoch = pieces.epoch
    first, second = (jax.tree.map(lambda x, i=i: x[i], TRAIN_TASKS) for i in (0, 1))
    carry, examples = pieces.init(jax.random.key(0)), on_device(TRAIN)
    omega = drop = 0.0
    for i in range(3):
        carry, report = epoch(carry, examples, first, jax.random.key(i))
        omega, drop = omega + report.path_integral, drop + report.loss_drop
        assert report.surrogate_loss == report.importance == 0
        assert report.negative == 0, "SGD without a pull only earns"
    total = sum(map(jnp.sum, jax.tree.leaves(carry.opt_state.synapses.path_integral)))
    np.testing.assert_allclose(omega, total, rtol=1e-5)
    assert 0 < drop < omega, "minibatch noise inflates ω"
    carry = pieces.finish(carry, examples, first, jax.random.key(8))
    carry, report = epoch(carry, examples, second, jax.random.key(9))
    synapses = si_jax.synapses(carry.opt_state)
    largest = max(float(x.max()) for x in jax.tree.leaves(synapses.importance))
    np.testing.assert_allclose(report.importance, largest)
    penalty = si_jax.surrogate_loss(carry.opt_state, carry.params)
    np.testing.assert_allclose(report.surrogate_loss, penalty, rtol=1e-6)
    omega = jnp.concatenate([x.ravel() for x in jax.tree.leaves(synapses[0])])
    np.testing.assert_allclose(report.negative, (omega < 0).mean())


def test_the_loss_drop_of_a_small_task_beside_a_large_one_is_of_all_its_examples():
    """20 examples of two classes, in rows for 700, so that 500 are looked at."""
    many = blobs(1400, 1)
    few = np.concatenate([np.flatnonzero(many.labels == k)[:10] for k in (2, 3)])
    rows = np.zeros((2, 700), np.int32)
    rows[0], rows[1, :20] = np.flatnonzero(many.labels < 2)[:700], few
    size = jnp.array([min(700, (many.labels < 2).sum()), 20], jnp.int32)
    pair = tasks.Task(jnp.asarray(rows), size, TRAIN_TASKS.classes)
    task = jax.tree.map(lambda x: x[1], pair)
    pieces = make(0.0, inner=optax.sgd(0.5))
    carry = pieces.init(jax.random.key(0))
    after, report = pieces.epoch(carry, on_device(many), task, jax.random.key(1))

    def loss(params):
        images = jnp.asarray(many.images[few], jnp.float32) / 255
        out = mask_logits(MODEL.apply(params, images), task.classes)
        labels = jnp.asarray(many.labels[few])
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

    drop = loss(carry.params) - loss(after.params)
    assert drop > 0.01
    np.testing.assert_allclose(report.loss_drop, drop, rtol=1e-3)


def test_a_network_whose_outputs_are_no_numbers_has_no_accuracy():
    """Not that of guessing the first class, the argmax of NaN."""
    pieces = make(inner=optax.sgd(1e30))
    carry, examples = pieces.init(jax.random.key(0)), on_device(TRAIN)
    task = jax.tree.map(lambda x: x[0], TRAIN_TASKS)
    for i in range(2):
        carry, report = pieces.epoch(carry, examples, task, jax.random.key(i))
    assert np.isnan([report.loss, report.accuracy]).all()
    assert np.isnan(pieces.evaluate(carry, on_device(TEST), TEST_TASKS)).all()
    # Of the outputs, those of other tasks do not matter.
    params = jax.tree.map(jnp.array, pieces.init(jax.random.key(0)).params)
    head = params["params"]["Dense_1"]
    head["bias"] = head["bias"].at[2].set(jnp.nan)
    found = pieces.evaluate(carry._replace(params=params), on_device(TEST), TEST_TASKS)
    assert np.isfinite(found).tolist() == [True, False]


def test_keep_count_resets_all_but_the_step_count():
    """Adam's first steps after it are several times as large, as in its docstring."""
    task, examples = jax.tree.map(lambda x: x[0], TRAIN_TASKS), on_device(TRAIN)
    after = {}
    tx = si_jax.with_synaptic_intelligence(lenient(optax.adam(0.01)), 0.3, 0.01)
    for keep_count in (False, True):
        pieces = make(boundary=[consolidate, reset(tx, keep_count=keep_count)])
        carry = pieces.init(jax.random.key(0))
        carry, _ = pieces.epoch(carry, examples, task, jax.random.key(1))
        count = optax.tree.get(carry.opt_state, "count")
        after[keep_count] = pieces.finish(carry, examples, task, jax.random.key(2))
    fresh, kept = after[False].opt_state, after[True].opt_state
    assert optax.tree.get(kept, "count") == count > 0
    chex.assert_trees_all_equal(optax.tree.set(kept, count=jnp.int32(0)), fresh)
    for moment in ("mu", "nu"):
        assert not any(x.any() for x in jax.tree.leaves(optax.tree.get(kept, moment)))

    grad, scale = jnp.ones(1), lenient(optax.scale_by_adam())
    fresh, late = (scale.init(grad) for _ in range(2))
    late = late._replace(count=jnp.int32(10**6))
    t = np.arange(1, 101)
    expected = (1 - 0.9**t) / np.sqrt(1 - 0.999**t)
    assert round(expected.max(), 1) == 6.6
    for factor in expected:
        (small, fresh), (large, late) = (
            scale.update(grad, fresh),
            scale.update(grad, late),
        )
        np.testing.assert_allclose(large / small, factor, rtol=1e-3)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("elastic", [True, False])
def test_without_synaptic_intelligence_epochs_report_the_rest(elastic, fresh):
    adam = lenient(optax.adam(0.01))
    link = ewc.elastic_weight_consolidation(10.0)
    tx = optax.chain(link, adam) if elastic else adam
    boundary = [consolidate_fisher(MODEL, 20)] * elastic + [reset(tx)] * fresh
    pieces = compiled(learner(MODEL, tx, (3, 3, 1), batch_size=16, boundary=boundary))
    first, second = (jax.tree.map(lambda x, i=i: x[i], TRAIN_TASKS) for i in (0, 1))
    carry, examples = pieces.init(jax.random.key(0)), on_device(TRAIN)
    carry, _ = pieces.epoch(carry, examples, first, jax.random.key(1))
    count = optax.tree.get(carry.opt_state, "count")
    carry = pieces.finish(carry, examples, first, jax.random.key(2))
    assert optax.tree.get(carry.opt_state, "count") == (0 if fresh else count)
    carry, report = pieces.epoch(carry, examples, second, jax.random.key(3))
    assert report.path_integral is report.negative is report.importance is None
    if elastic:
        assert report.surrogate_loss > 0
    else:
        assert report.surrogate_loss is None


def test_dropout_is_drawn_anew_at_every_step_and_off_in_evaluation():
    model = MLP((16,), 4, dropout=0.5)
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.1), 0.0)

    def pieces(dropout):
        return compiled(learner(model, tx, (3, 3, 1), batch_size=16, dropout=dropout))

    dropped, plain = pieces(True), pieces(False)
    task = jax.tree.map(lambda x: x[0], TRAIN_TASKS)
    carry, examples = plain.init(jax.random.key(0)), on_device(TRAIN)
    epoch = dropped.epoch
    once, again, other = (
        epoch(carry, examples, task, jax.random.key(i))[0].params for i in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, once, again)
    without = plain.epoch(carry, examples, task, jax.random.key(1))[0].params
    for params in (other, without):
        kernel = params["params"]["Dense_1"]["kernel"]
        assert (kernel != once["params"]["Dense_1"]["kernel"]).any()
    carry = carry._replace(params=once)
    np.testing.assert_array_equal(
        dropped.evaluate(carry, examples, TRAIN_TASKS),
        plain.evaluate(carry, examples, TRAIN_TASKS),
    )


def test_parts_of_a_batch_add_up_to_its_gradient():
    """The last batch is smaller: some parts are half empty, some empty."""
    task = jax.tree.map(lambda x: x[1], TRAIN_TASKS)
    assert 0 < int(task.size) % 32 < 24
    tx = si_jax.with_synaptic_intelligence(optax.sgd(0.5), 0.0)
    found = []
    for part in (0, 8):
        pieces = compiled(
            learner(MODEL, tx, (3, 3, 1), batch_size=32, micro_batch=part)
        )
        carry = pieces.init(jax.random.key(0))
        epoch = pieces.epoch
        found.append(epoch(carry, on_device(TRAIN), task, jax.random.key(1)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found
    )
    with pytest.raises(ValueError, match="micro_batch must divide the batch size 32"):
        learner(MODEL, tx, (3, 3, 1), batch_size=32, micro_batch=5)


def test_from_scratch_every_task_starts_with_the_initial_network(tmp_path):
    scratch = a_run(make, seeds=[3], epochs=2, strength=0.0, from_scratch=True)
    result = progress.results(scratch, Record("blobs", Options(out=tmp_path)))
    key, pieces = jax.random.key(3), make(0.0)
    carry = pieces.init(init_key(key))
    second = jax.tree.map(lambda x: x[1], TRAIN_TASKS)
    for i in range(2):
        keys = epoch_key(key, 1, i)
        carry, _ = pieces.epoch(carry, on_device(TRAIN), second, keys)
    expected = pieces.evaluate(carry, on_device(TEST), TEST_TASKS)
    np.testing.assert_allclose(result["test"][0, 1], expected, atol=0.03)


@dataclasses.dataclass(frozen=True)
class Config(Options):
    seeds: int = 1
    epochs: int = 1
    damping: float = 0.01
    PICKS = ("seeds",)


@pytest.mark.slow
def test_added_seeds_are_what_all_at_once_gives(tmp_path):
    """In groups, whose first task the methods go on sharing."""

    def run_some(folder, seeds, *names):
        config = Config(out=tmp_path / folder, seeds=seeds)
        record = Record("blobs", config)
        shared = {"seeds": range(seeds), "epochs": 1, "first_task": "first task"}
        runs = [
            a_run(make, method=name, strength=strength, **shared)
            for name, strength in (("si", 30.0), ("fine-tuning", 0.0))
            if name in names
        ]
        driver.run_all(runs, record)
        results = json.loads((config.out / "results.json").read_text())
        return results["runs"], results["summary"]

    run_some("added", 1, "fine-tuning")
    added, summary = run_some("added", 3, "si", "fine-tuning")
    together, summary_together = run_some("together", 3, "si", "fine-tuning")
    for method, run in together.items():
        for split in ("test", "train", "initial"):
            assert added[method][split] == run[split]
        assert [part["seeds"] for part in added[method]["parts"]] == [1, 2]
    assert summary == summary_together
    log = (tmp_path / "added" / "metrics.jsonl").read_text().splitlines()
    logged = [(x["method"], x["seeds"], x["task"]) for x in map(json.loads, log)]
    assert sorted(logged) == sorted(set(logged)), "nothing was run twice"
    with pytest.raises(UserError, match="holds 3 seeds of si"):
        run_some("added", 2, "si")


def test_what_diverges_is_said_and_kept(tmp_path, capsys):
    """The second of two runs, in the second task: its first accuracies stay."""

    def make_learner(strength, number):
        pieces = plain(strength)

        def finish(carry, examples, task, key):
            carry = pieces.finish(carry, examples, task, key)
            gone = (number == 1) & task.classes[2]
            params = jax.tree.map(lambda x: jnp.where(gone, jnp.nan, x), carry.params)
            return carry._replace(params=params)

        return pieces._replace(finish=finish)

    record = Record("blobs", Config(out=tmp_path, seeds=2))
    given = {"given": lambda _: {"number": np.arange(2)}, "seeds": range(2)}
    driver.run_all([a_run(make_learner, epochs=1, strength=0.3, **given)], record)
    gone = np.isnan(record.runs["si"]["test"])
    assert gone.any(2).tolist() == [[False, False], [False, True]]
    assert record.runs["si"]["diverged"] == [1]
    first, second = capsys.readouterr().out.splitlines()
    assert "diverged" not in first
    assert "task 2/2, held-out accuracy so far nan, 1 of 2 diverged" in second


def test_a_run_that_goes_on_under_other_versions_names_both(tmp_path, monkeypatch):
    """Also where only the task that it shares with another was trained before."""
    config = Config(out=tmp_path, epochs=2)
    here = progress.versions()

    def version(number):
        found = {**here, "jaxlib": number}
        for place in ("progress", "record"):
            monkeypatch.setattr(f"experiments.engine.{place}.versions", lambda: found)
        return found

    arm = functools.partial(a_run, make, epochs=2, first_task="first task")
    a, b = arm(method="a", strength=0.3), arm(method="b", strength=0.5)
    first = version("1")
    record, log = Record("blobs", config), Record.log
    driver.run_all([a], record)
    assert not {"versions", "earlier_versions"} & set(record.runs["a"])

    second = version("2")  # b begins with what the first has left

    def stop(record, **entry):
        log(record, **entry)
        if entry["position"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "log", stop)
    config = dataclasses.replace(config, checkpoint_every=1)
    record = Record("blobs", config)
    with pytest.raises(KeyboardInterrupt):
        driver.run_all([b], record)
    monkeypatch.setattr(Record, "log", log)
    third = version("3")
    record = Record("blobs", config)
    driver.run_all([b], record)
    run = json.loads((tmp_path / "results.json").read_text())["runs"]["b"]
    assert run["versions"] == third
    assert run["earlier_versions"] == [first, second]


def test_checkpoints_of_another_network_end_in_a_message_and_stay(tmp_path):
    """As after a change of the code, which no configuration shows."""
    record = Record("blobs", Config(out=tmp_path))
    state = progress.State(*({"w": np.zeros(n)} for n in (2, 1, 1, 1, 1)))
    record.checkpoints("si seeds 0-0").save(1, state)
    grown = state._replace(carry={"w": np.zeros(3)})
    message = r"carry/w is float64 \(2,\) in it, .* Choose another --out"
    with pytest.raises(UserError, match=message):
        progress.restored(record, "si seeds 0-0", grown)
    assert progress.restored(record, "si seeds 0-0", state)[0] == 1


def test_finish_merges_the_fisher_information_of_the_tasks_examples():
    tx = optax.chain(ewc.elastic_weight_consolidation(1.0), optax.sgd(0.1))
    tx = si_jax.with_synaptic_intelligence(tx, 0.0)
    task = jax.tree.map(lambda x: x[1], TRAIN_TASKS)
    count = int(task.size)
    twice = consolidate_fisher(MODEL, 2 * count)  # each of the examples
    boundary = [twice, consolidate, reset(tx)]
    pieces = compiled(learner(MODEL, tx, (3, 3, 1), batch_size=16, boundary=boundary))
    carry = pieces.init(jax.random.key(0))
    carry = pieces.finish(carry, on_device(TRAIN), task, jax.random.key(1))
    images, _ = tasks.look_up(on_device(TRAIN), task.rows[:count])

    def logits(params, image):
        return mask_logits(MODEL.apply(params, image[None]), task.classes)[0]

    def expected_square(image):  # over the two labels, by their probability
        def log_likelihoods(params):
            return jax.nn.log_softmax(logits(params, image))[jnp.array(GROUPS[1])]

        p = jnp.exp(log_likelihoods(carry.params))
        gradients = jax.jacobian(log_likelihoods)(carry.params)
        return jax.tree.map(lambda g: jnp.tensordot(p, jnp.square(g), 1), gradients)

    exact = jax.tree.map(lambda x: x.mean(0), jax.vmap(expected_square)(images))
    (state,) = [
        x
        for x in jax.tree.leaves(
            carry.opt_state,
            is_leaf=lambda x: isinstance(x, ewc.ElasticWeightConsolidationState),
        )
        if isinstance(x, ewc.ElasticWeightConsolidationState)
    ]
    kernel = state.importance["params"]["Dense_1"]["kernel"]
    expected = exact["params"]["Dense_1"]["kernel"]
    assert not kernel[:, :2].any(), "the other task's outputs"
    np.testing.assert_allclose(kernel[:, 2:].sum(), expected[:, 2:].sum(), rtol=0.1)


def test_the_first_task_ends_as_it_is_and_the_next_half_way():
    tx = optax.chain(ewc.elastic_weight_consolidation(1.0), optax.sgd(0.1))
    w = jnp.zeros(2)
    carry, half = Carry(w, tx.init(w)), merge(0.5)
    rest = (None, None, jax.random.key(0))
    carry = half(carry._replace(params=w + 1), *rest)
    np.testing.assert_array_equal(carry.params, [1, 1])
    held = ewc.consolidate(carry.opt_state, carry.params, jnp.array([0.0, 2.0]))
    carry = half(Carry(carry.params + 1, held), *rest)
    np.testing.assert_array_equal(carry.params, [1.5, 1.5])


def test_finish_merges_the_kronecker_factors_of_the_tasks_examples():
    shapes = kronecker_factors(MODEL, (3, 3, 1))
    tx = optax.chain(kronecker.kronecker_consolidation(1.0, shapes), optax.sgd(0.1))
    task = jax.tree.map(lambda x: x[1], TRAIN_TASKS)
    count = int(task.size)
    twice = consolidate_kronecker(MODEL, 2 * count)  # each of the examples
    pieces = learner(MODEL, tx, (3, 3, 1), batch_size=16, boundary=[twice, reset(tx)])
    pieces = compiled(pieces)
    carry = pieces.init(jax.random.key(0))
    carry = pieces.finish(carry, on_device(TRAIN), task, jax.random.key(1))
    images, _ = tasks.look_up(on_device(TRAIN), task.rows[:count])
    first, second = (carry.params["params"][f"Dense_{i}"] for i in (0, 1))
    x = images.reshape(count, -1)
    hidden = jax.nn.relu(x @ first["kernel"] + first["bias"][None])
    p = np.zeros((count, 4))  # the other task's outputs take no part
    p[:, 2:] = jax.nn.softmax((hidden @ second["kernel"])[:, 2:])
    slopes = np.einsum("nj,jk->jk", p, np.eye(4)) - p.T @ p  # over the two labels

    layers = carry.opt_state[0].factors.layers
    names = [f"['params']['Dense_{i}']['kernel']" for i in (0, 1)]
    for name, a in zip(names, (x, hidden), strict=True):
        layer = layers[name]
        n = a.shape[1]
        second_moments = a.T @ a / count
        np.testing.assert_allclose(
            layer.inputs.reshape(n, n), second_moments, rtol=1e-4, atol=1e-6
        )
        (mean,) = layer.bias.values()
        np.testing.assert_allclose(mean.ravel(), a.mean(0), rtol=1e-4, atol=1e-6)
    outputs = layers[names[1]].outputs.reshape(4, 4)
    np.testing.assert_allclose(outputs, slopes / count, atol=0.02)
    assert not outputs[:2].any(), "the other task's outputs"


def test_initial_and_epoch_keys_never_meet():
    key = jax.random.key(0)
    keys = [init_key(key), permutations_key(key)]
    keys += [epoch_key(key, t, e) for t in range(3) for e in range(3)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == len(keys)


# --- Permuted tasks -------------------------------------------------------------------


def permuted_problem(count=3):
    train, test = (tasks.permuted(len(e.labels), count, 4) for e in (TRAIN, TEST))
    return Problem(TRAIN, TEST, train, test, permutations=count)


def drive(make, problem, folder, *, seeds=2, epochs=3, **values):
    settings = {"seeds": range(seeds), "epochs": epochs, "problem": problem}
    record = Record("blobs", Options(out=folder))
    return progress.results(a_run(make, **settings, **values), record)


def make_permuted(strength, remember=3):
    tx = si_jax.with_synaptic_intelligence(lenient(optax.adam(0.01)), strength, 0.01)
    pieces = learner(MODEL, tx, (3, 3, 1), batch_size=16, boundary=[consolidate])
    return compiled(remembering(pieces, remember) if remember else pieces)


@pytest.mark.slow
def test_the_driver_permutes_each_run_its_own_way_and_correlates_omega(tmp_path):
    """Against runs on copies of the images."""
    result = drive(make_permuted, permuted_problem(), tmp_path, strength=0.3)
    assert result["test"].shape == (2, 3, 3)
    name = "params/Dense_0/kernel"
    assert result["correlations"][name].shape == (2, 3, 3)
    for seed in range(2):
        key = jax.random.key(seed)
        pieces = make_permuted(0.3)
        carry = pieces.init(init_key(key))
        seen = tasks.permute(TRAIN, permutations_key(key), 3)
        copies = [
            Examples(
                TRAIN.images.reshape(-1, 9)[:, np.asarray(p)].reshape(-1, 3, 3, 1),
                TRAIN.labels,
            )
            for p in seen.pixels
        ]
        task = jax.tree.map(lambda x: x[0], tasks.permuted(len(TRAIN.labels), 1, 4))
        omegas = []
        for number, copy in enumerate(map(on_device, copies)):
            for i in range(3):
                key_i = epoch_key(key, number, i)
                carry, _ = pieces.epoch(carry, copy, task, key_i)
            omega = si_jax.synapses(carry.opt_state).path_integral
            omegas.append(np.ravel(omega["params"]["Dense_0"]["kernel"]))
            end = epoch_key(key, number, 3)
            carry = pieces.finish(carry, copy, task, end)
        np.testing.assert_allclose(
            result["correlations"][name][seed], np.corrcoef(omegas), atol=1e-3
        )
        every = jax.tree.map(lambda x: x[None], task)
        accuracy = [pieces.evaluate(carry, on_device(c), every)[0] for c in copies]
        np.testing.assert_allclose(result["train"][seed, -1], accuracy, atol=0.02)


def test_all_tasks_at_once_are_one_stage(tmp_path):
    problem = permuted_problem(2)
    stages = tasks.together(problem.train_tasks)
    assert stages.size.tolist() == [2 * len(TRAIN.labels)]
    result = drive(
        lambda strength: make_permuted(strength, remember=0),
        problem._replace(stages=stages),
        tmp_path,
        epochs=8,
        strength=0.0,
    )
    assert result["test"].shape == (2, 1, 2)
    assert (result["test"] > 0.9).all()
    assert "correlations" not in result


def test_what_is_remembered_is_the_newest_last():
    pieces = make_permuted(0.0, remember=2)
    carry, examples = pieces.init(jax.random.key(0)), on_device(TRAIN)
    task = jax.tree.map(lambda x: x[0], TRAIN_TASKS)
    seen = []
    for i in range(3):
        carry, _ = pieces.epoch(carry, examples, task, jax.random.key(i))
        seen.append(si_jax.synapses(carry.opt_state).path_integral)
        carry = pieces.finish(carry, examples, task, jax.random.key(i))
    jax.tree.map(
        lambda kept, *new: np.testing.assert_array_equal(kept, np.stack(new)),
        carry.path_integrals,
        *seen[1:],
    )
    assert set(correlations(carry)) == {
        "params/Dense_0/kernel",
        "params/Dense_1/kernel",
    }
