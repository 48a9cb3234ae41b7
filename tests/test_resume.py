"""A run that is killed at any moment ends bit for bit as one that ran through."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import made_up
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Split MNIST on made-up digits, small enough to be run many times."""
    folder = tmp_path_factory.mktemp("tfds")
    made_up.write(folder, "mnist", train=4000, test=500)
    arguments = ["--data-dir", str(folder), "--seeds", "2", "--epochs", "3"]
    arguments += ["--hidden", "64", "--checkpoint-every", "1"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax"))}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(out, *more, experiment="split_mnist"):
        program = [sys.executable, "-m", f"experiments.{experiment}", *arguments]
        return subprocess.Popen(
            [*program, "--out", str(out), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **cache},
        )

    return start


@pytest.fixture(scope="module")
def through(command, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("through")
    process = command(out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def accuracies(out):
    runs = json.loads((out / "results.json").read_text())["runs"]
    return {m: {k: v for k, v in r.items() if k != "seconds"} for m, r in runs.items()}


def logged(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def progress(out):
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_at_random_moments(command, through, tmp_path):
    moments, kills = random.Random(0), 0
    while True:
        process = command(tmp_path)
        if kills < 5:
            goal = progress(tmp_path) + moments.randint(1, 12)
            while progress(tmp_path) < goal and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.random() * 0.3)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert kills == 5
    assert accuracies(tmp_path) == accuracies(through)
    assert logged(tmp_path) == logged(through)


def test_killed_with_ewc_dropout_and_remembered_omega(command, tmp_path):
    more = ["--methods", "si", "ewc", "sgd+dropout", "--tasks", "3"]
    more += ["--batch-size", "100", "--fisher-examples", "50"]

    def start(out):
        return command(out, *more, experiment="permuted_mnist")

    through, killed = tmp_path / "through", tmp_path / "killed"
    process = start(through)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert progress(through) == 3 * 9
    for goal in (4, 13, 22):  # in the midst of each method
        process = start(killed)
        while progress(killed) < goal and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    process = start(killed)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert accuracies(killed) == accuracies(through)
    assert logged(killed) == logged(through)


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    reason="started in the background, where Ctrl-C is ignored",
)
def test_interrupted_and_its_newest_checkpoint_damaged(command, through, tmp_path):
    process = command(tmp_path)
    while progress(tmp_path) < 6:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in errors
    checkpoints = tmp_path / "checkpoints" / "si-c=1-seeds-0-1"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    shutil.rmtree(checkpoints / str(newest) / "default")
    process = command(tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "is damaged" in errors
    assert accuracies(tmp_path) == accuracies(through)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot take a core")
def test_resuming_on_another_number_of_devices(command, tmp_path):
    """Three runs are four on two devices, one of them padding, and three on one."""
    more = ["--seeds", "3", "--strengths", "1", "--sgd-learning-rate", "0"]
    process = command(tmp_path, *more)
    while progress(tmp_path) < 7:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    before = logged(tmp_path)[:4]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        process = command(tmp_path, *more)
    finally:
        os.sched_setaffinity(0, cores)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "damaged" not in errors
    assert logged(tmp_path)[:4] == before, "it did not start again"
    assert np.shape(accuracies(tmp_path)["si c=1"]["test"]) == (3, 5, 5)


def test_another_configuration_is_refused_before_anything_is_finished(
    command, tmp_path
):
    process = command(tmp_path)
    while progress(tmp_path) < 1:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["epochs"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = command(tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "epochs: 30 there, 3 now" in errors


def two_processes(command, out, port, *more):
    both = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", *more]
    return [command(out, *both, "--process-id", str(i)) for i in range(2)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_share_the_runs_and_survive_the_loss_of_one(command, tmp_path):
    """Equal to one process; lost one, the other says so, and both go on."""
    more = ["--seeds", "4", "--epochs", "6", "--checkpoint-every", "4"]
    more += ["--strengths", "1", "--sgd-learning-rate", "0"]
    alone = command(tmp_path / "alone", *more)
    _, errors = alone.communicate()
    assert alone.returncode == 0, errors

    out = tmp_path / "both"
    first, second = two_processes(command, out, free_port(), *more)
    while progress(out) < 7 and first.poll() is None:  # in the second task's midst
        time.sleep(0.01)
    second.kill()
    second.communicate()
    _, errors = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "Start all of them again with the same command" in errors
    assert "Traceback" not in errors

    processes = two_processes(command, out, free_port(), *more)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Libraries may write lines of their own, whole or interleaved.
    reports = ["average" in said and "Took" in said for said, _ in outputs]
    assert reports == [True, False], "one of them reports"
    assert accuracies(out) == accuracies(tmp_path / "alone")
    assert logged(out) == logged(tmp_path / "alone")
