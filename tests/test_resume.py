"""A run that is killed at any moment ends bit for bit as one that ran through."""

import json
import os
import random
import shutil
import socket
from signal import SIGINT, SIGKILL

import made_up
import numpy as np
import pytest
from started import End, Started, run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Arguments that make the experiments small enough to be run many times."""
    folder = tmp_path_factory.mktemp("tfds")
    made_up.write(folder, "mnist", train=4000, test=500)
    small = ["--data-dir", folder, "--seeds", "2", "--epochs", "3"]
    return [*small, "--hidden", "64", "--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def through(small, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("through") / "out"
    finished("split_mnist", *small, out=out)
    return out


def accuracies(out):
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {m: {k: v for k, v in r.items() if k != "seconds"} for m, r in runs.items()}


def logged(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def finished(*arguments, **more):
    status, said, errors = run(*arguments, **more)
    assert status == 0, errors
    return said, errors


def killed(*arguments, epoch, calls=0, **more):
    end = End(SIGKILL, epoch, calls)
    status, _, errors = run(*arguments, end=end, **more)
    assert status == -SIGKILL, errors


@pytest.mark.slow
def test_killed_at_random_moments(small, through, tmp_path):
    moments, out = random.Random(0), tmp_path / "out"
    for _ in range(5):  # of 45 epochs
        epoch, calls = moments.randint(1, 9), moments.randint(0, 20_000)
        killed("split_mnist", *small, out=out, epoch=epoch, calls=calls)
    finished("split_mnist", *small, out=out)
    assert accuracies(out) == accuracies(through)
    assert logged(out) == logged(through)


@pytest.mark.slow
def test_killed_with_ewc_dropout_and_remembered_omega(small, tmp_path):
    more = ["permuted_mnist", *small, "--methods", "si", "ewc", "sgd+dropout"]
    more += ["--tasks", "3", "--batch-size", "100", "--fisher-examples", "50"]
    through, out = tmp_path / "through", tmp_path / "killed"
    finished(*more, out=through)
    assert len(logged(through)) == 3 * 9
    for epoch in (4, 9, 9):  # in the midst of each method
        killed(*more, out=out, epoch=epoch)
    finished(*more, out=out)
    assert accuracies(out) == accuracies(through)
    assert logged(out) == logged(through)


@pytest.mark.slow
def test_interrupted_and_its_newest_checkpoint_damaged(small, through, tmp_path):
    out = tmp_path / "out"
    end = End(SIGINT, epoch=6)
    status, _, errors = run("split_mnist", *small, out=out, end=end)
    assert status == 1
    assert errors.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in errors
    checkpoints = out / "checkpoints" / "si-c=1-seeds-0-1"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    shutil.rmtree(checkpoints / str(newest) / "default")
    _, errors = finished("split_mnist", *small, out=out)
    assert "is damaged" in errors
    assert accuracies(out) == accuracies(through)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot take a core")
def test_resuming_on_another_number_of_devices(small, tmp_path):
    """Three runs are four on two devices, one of them padding, and three on one."""
    more = ["split_mnist", *small, "--seeds", "3", "--strengths", "1"]
    more += ["--sgd-learning-rate", "0"]
    out = tmp_path / "out"
    killed(*more, out=out, epoch=7)
    before = logged(out)[:4]
    one = {min(os.sched_getaffinity(0))}
    _, errors = finished(*more, out=out, cores=one)
    assert "damaged" not in errors
    assert logged(out)[:4] == before, "it did not start again"
    assert np.shape(accuracies(out)["si c=1"]["test"]) == (3, 5, 5)


def test_another_configuration_is_refused_before_anything_is_finished(small, tmp_path):
    out = tmp_path / "out"
    killed("split_mnist", *small, out=out, epoch=1)
    config = json.loads((out / "config.json").read_text())
    config["config"]["epochs"] = 30
    (out / "config.json").write_text(json.dumps(config))
    status, _, errors = run("split_mnist", *small, out=out)
    assert status == 1
    assert "epochs: 30 there, 3 now" in errors


@pytest.mark.slow
def test_two_processes_share_the_runs_and_survive_the_loss_of_one(small, tmp_path):
    """Equal to one process; lost one, the other says so, and both go on."""
    more = ["split_mnist", *small, "--seeds", "4", "--epochs", "6"]
    more += ["--checkpoint-every", "4", "--strengths", "1", "--sgd-learning-rate", "0"]
    alone, out = tmp_path / "alone", tmp_path / "both"
    finished(*more, out=alone)

    def both(end=None):
        with socket.socket() as held:  # the coordinator may share the port, no other
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{held.getsockname()[1]}"
            joined = [*more, "--coordinator", address, "--num-processes", "2"]
            processes = [
                Started(*joined, "--process-id", i, out=out, end=end if i else None)
                for i in range(2)
            ]
            return [process.wait() for process in processes]

    # The second is lost in the second task's midst.
    (first, _, errors), (second, *_) = both(End(SIGKILL, epoch=7))
    assert second == -SIGKILL
    assert first not in (0, -SIGKILL)
    assert "Start all of them again with the same command" in errors
    assert "Traceback" not in errors

    ends = both()
    assert [status for status, *_ in ends] == [0, 0], ends
    # Libraries may write lines of their own, whole or interleaved.
    reports = ["average" in said and "Took" in said for _, said, _ in ends]
    assert reports == [True, False], "one of them reports"
    assert accuracies(out) == accuracies(alone)
    assert logged(out) == logged(alone)
