"""Users' mistakes end in one clear message."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
from started import run

from experiments import permuted_mnist, split_cifar, sweep
from experiments.engine import command
from experiments.engine.command import CONFIGS, UserError, parse
from experiments.finetune import config as finetune
from experiments.scenarios import config as scenarios
from experiments.split_mnist import Config
from experiments.why import config as why


def test_the_file_gives_defaults_and_the_command_line_overrides(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("epochs = 3\nstrengths = [0.5]\nreset_optimizer = false\n")
    config = parse(Config, "split_mnist", ["--config", str(file), "--epochs", "4"])
    assert config == Config(epochs=4, strengths=(0.5,), reset_optimizer=False)
    assert parse(
        Config, "split_mnist", ["--config", str(file), "--strengths", "0", "1"]
    ).strengths == (0.0, 1.0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("split_mnist*.toml")))
def test_shipped_configurations_are_valid(path):
    assert isinstance(parse(Config, "split_mnist", ["--config", str(path)]), Config)


def test_the_default_file_says_what_the_dataclass_says():
    assert parse(Config, "split_mnist", []) == Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "own.toml: unknown key 'epoch'; did you mean 'epochs'?"),
        ("zzz = 3", "unknown key 'zzz'; keys: out"),
        ("epochs = ", "is not TOML"),
    ],
)
def test_mistakes_in_the_file(content, message, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        parse(Config, "split_mnist", ["--config", str(file)])
    assert message in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.toml"):
        parse(Config, "split_mnist", ["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('epochs = "many"', [], "--epochs"),
        ("damping = 0.0", [], "damping must be > 0 and finite, got 0.0"),
        ("", ["--strengths", "-1"], "strengths must be >= 0 and finite, got (-1.0,)"),
        ("seeds = 0", [], "seeds must be at least 1, got 0"),
        ("hidden = [8, 0]", [], "hidden widths must be at least 1"),
        ("", ["--epochs", "many"], "--epochs"),
        ("", ["--keep-count", "--no-reset-optimizer"], "keep_count needs"),
        ("", ["--strengths", "0.1", "0.10000001"], "must be one or more, and differ"),
        ("strengths = []", [], "must be one or more, and differ"),
        ("", ["--epoch", "3"], "--epochs"),
        ("", ["--data", "mnits"], "mnist5k"),
    ],
)
def test_values_and_flags_that_make_no_sense_end_with_status_2(
    content, arguments, message, tmp_path, capsys
):
    file = tmp_path / "own.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as end:
        parse(Config, "split_mnist", ["--config", str(file), *arguments])
    assert end.value.code == 2
    assert message in "".join(capsys.readouterr())


CONFIGURATIONS = {
    "finetune": finetune.Config,
    "permuted_mnist": permuted_mnist.Config,
    "scenarios": scenarios.Config,
    "split_cifar": split_cifar.Config,
    "sweep": sweep.Config,
    "why": why.Config,
}


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [
        ("finetune", "--methods", "methods must name at least one"),
        ("finetune", "--old a.txt", "--old and --new go together"),
        ("finetune", "--heads 3", "heads must divide width"),
        ("finetune", "--steps 100", "steps must be a multiple of 128"),
        ("finetune", "--micro-batch 3", "micro_batch must divide batch_size"),
        ("finetune", "--si-strengths -1", "si_strengths must be >= 0"),
        ("finetune", "--third-steps -128", "third_steps must be at least 0"),
        ("permuted_mnist", "--methods adam", "invalid choice"),
        ("permuted_mnist", "--damping 0", "damping must be > 0"),
        ("permuted_mnist", "--ewc-strengths -1", "strengths must be >= 0"),
        ("permuted_mnist", "--held-out 1", "held_out must be in [0, 1)"),
        ("permuted_mnist", "--dropout 1", "dropout must be in [0, 1)"),
        ("permuted_mnist", "--tasks 0", "tasks must be at least 1"),
        ("permuted_mnist", "--methods", "methods must name at least one"),
        ("permuted_mnist", "--hidden", "hidden must be widths"),
        ("permuted_mnist", "--damping inf", "damping must be > 0 and finite"),
        ("scenarios", "--scenario data", "invalid choice"),
        ("scenarios", "--scenario", "scenario must name at least one"),
        ("scenarios", "--held-out 0", "held_out must be between 0 and 1"),
        ("scenarios", "--mas-strengths -1", "mas_strengths must be >= 0"),
        ("scenarios", "--grid-seeds 0", "grid_seeds must be at least 1"),
        ("split_cifar", "--micro-batch 100", "micro_batch must divide batch_size"),
        ("split_cifar", "--examples -1", "examples must be at least 0"),
        ("split_cifar", "--data cifar100", "invalid choice"),
        ("split_cifar", "--held-out 1", "held_out must be in [0, 1)"),
        ("why", "--importances sgd", "invalid choice"),
        ("why", "--batch-sizes 0", "batch_sizes must be >= 1"),
        ("why", "--pulls -1", "pulls must be >= 0"),
        ("why", "--held-out 1", "held_out must be between 0 and 1"),
        ("why", "--networks 0", "networks must be at least 1"),
        ("sweep", "--damping 0.1", "Unrecognized options: --damping"),
        ("sweep", "--dampings 0", "dampings must be > 0"),
        ("sweep", "--strengths -1", "strengths must be >= 0"),
        ("sweep", "--held-out 1", "held_out must be between 0 and 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(experiment, arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(CONFIGURATIONS[experiment], experiment, arguments.split())
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_names_the_file_and_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, "split_mnist", ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--config FILE" in text
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text


def test_the_experiments_are_listed(capsys):
    runpy.run_module("experiments", run_name="__main__")
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert "python -m experiments.NAME --help" in first
    listed = dict(line.split(maxsplit=1) for line in lines)
    folder = CONFIGS.parent / "experiments"
    assert set(listed) == {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in [*folder.glob("*.py"), *folder.glob("*/__main__.py")]
        if "    command.main(" in path.read_text("utf-8")
    }
    assert listed["split_mnist"] == "Split MNIST, the paper's Fig. 3"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (UserError("no such thing"), "error: no such thing"),
        (command.DataError("no data"), "error: no data"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_main_turns_mistakes_into_messages(failure, message, monkeypatch):
    def run(_):
        raise failure

    monkeypatch.setattr(sys, "argv", ["split_mnist"])
    monkeypatch.setattr(command.jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        command.main(Config, "split_mnist", run)
    assert str(end.value.code).startswith(message)


def test_an_output_that_nobody_reads_is_no_lost_process(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["split_mnist"])
    monkeypatch.setattr(command.jax.config, "update", lambda *_: None)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit, match="nobody reads the output"):
            command.main(Config, "split_mnist", lambda _: print("a table"))
        print("flushed into nothing")


@pytest.mark.parametrize(
    ("backend", "environment", "kept"),
    [
        ("cpu", {}, False),
        ("gpu", {}, True),
        ("gpu", {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, False),
    ],
)
def test_accelerators_keep_what_they_compile(backend, environment, kept, monkeypatch):
    updates = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["split_mnist"])
    monkeypatch.setattr(command.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(command.jax.config, "update", updates.__setitem__)
    command.main(Config, "split_mnist", lambda _: None)
    folder = updates.get("jax_compilation_cache_dir")
    assert folder == ("/cache/si_jax" if kept else None)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, 0),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, 0),  # salloc or sbatch, no srun
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, 0),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, 1),
    ],
)
def test_the_tasks_of_srun_are_joined_and_no_others(environment, joins, monkeypatch):
    tried = []
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["split_mnist"])
    monkeypatch.setattr(command.jax.config, "update", lambda *_: None)
    join = command.jax.distributed
    monkeypatch.setattr(join, "initialize", lambda: tried.append(1))
    command.main(Config, "split_mnist", lambda _: None)
    assert len(tried) == joins

    def fail():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(join, "initialize", fail)
    if joins:
        with pytest.raises(SystemExit, match=r"cannot join SLURM's other tasks: coord"):
            command.main(Config, "split_mnist", lambda _: None)


@pytest.mark.parametrize("imported", [True, False])
def test_without_its_packages_an_import_is_an_error_and_a_command_ends(imported):
    """Neither ends the process of one who imports it."""
    hide = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "tyro" else find(name)
"""
    use = """
try:
    import experiments
except ImportError as error:
    print(error)
"""
    if not imported:
        use = "sys.argv[0] = '-m'\nrunpy.run_module('experiments')"
    found = subprocess.run(
        [sys.executable, "-c", hide + use],
        capture_output=True,
        text=True,
        cwd=CONFIGS.parent,
    )
    message = 'the experiments need tyro: pip install -e ".[experiments]"\n'
    assert found.returncode == (0 if imported else 1)
    assert found.stdout == (message if imported else "")
    assert found.stderr == ("" if imported else f"error: {message}")


@pytest.mark.parametrize("chosen", [None, "tensorfloat32"])
def test_float32_is_multiplied_in_float32_unless_one_chooses(chosen, monkeypatch):
    updates = {}
    name = "JAX_DEFAULT_MATMUL_PRECISION"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    monkeypatch.setattr(sys, "argv", ["split_mnist"])
    monkeypatch.setattr(command.jax.config, "update", updates.__setitem__)
    seen = []

    def run(_):
        seen.append(updates.get(name.lower()))

    command.main(Config, "split_mnist", run)
    assert seen == [None if chosen else "highest"]


@pytest.mark.slow
def test_the_command_from_start_to_finish(tmp_path):
    out = tmp_path / "out"
    common = ["split_mnist", "--data", "mnist5k", "--seeds", "2", "--epochs"]
    status, said, errors = run(*common, "3", out=out)
    assert status == 0, errors
    assert "%|" not in errors, "no bar where there is no terminal"
    for word in (
        "si c=1: task 5/5, held-out accuracy so far 0.",
        "si c=1",
        "fine-tuning",
        "sgd",
        "average",
        "±",
    ):
        assert word in said
    files = {"config.json", "results.json", "results.csv", "metrics.jsonl"}
    shown = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert shown == files | {
        "checkpoints",
        "split_mnist.png",
        "split_mnist.pdf",
    }
    results = (out / "results.json").read_text()
    runs = json.loads(results)["runs"]
    mean = {m: np.mean(np.array(run["test"])[:, -1]) for m, run in runs.items()}
    assert mean["si c=1"] > mean["fine-tuning"] + 0.02
    assert mean["sgd"] > mean["fine-tuning"] + 0.02

    status, said, errors = run(*common, "3", out=out)
    assert status == 0, errors
    assert "Finished before" in said
    assert (out / "results.json").read_text() == results

    status, _, errors = run(*common, "2", out=out)
    assert status == 1
    assert f"error: {out} holds the results of another" in errors
    assert "epochs: 3 there, 2 now" in errors
    assert (out / "results.json").read_text() == results


def test_without_data_the_command_says_what_to_do(tmp_path):
    out = tmp_path / "out"
    status, _, errors = run("split_mnist", "--data-dir", tmp_path, out=out)
    assert status == 1
    assert "error: mnist is not in" in errors
    assert "--data mnist5k" in errors
    assert "Traceback" not in errors
