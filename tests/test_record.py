import dataclasses
import json
import os
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import figures
from experiments.engine.choice import choose
from experiments.engine.command import Options, UserError
from experiments.engine.export import FIELDS
from experiments.engine.measures import statistics, summarize
from experiments.engine.record import Record
from experiments.engine.run import Label, with_fields
from experiments.engine.tables import aligned, cell, number, over_seeds, table
from experiments.engine.versions import versions
from experiments.figures.style import STYLE

MATRIX = np.array([[[1.0, 0.5], [0.75, 1.0]], [[1.0, 0.5], [0.25, 1.0]]])
RUN = {"test": MATRIX, "train": MATRIX, "initial": MATRIX[:, 0], "seconds": 1.5}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    out: Path = Path("unused")
    epochs: int = 3
    strengths: tuple[float, ...] = (1.0,)


def test_finished_methods_are_kept(tmp_path):
    Record("e", Config(out=tmp_path)).add("si", RUN)
    runs = Record("e", Config(out=tmp_path, data_dir=tmp_path)).runs
    np.testing.assert_array_equal(runs["si"]["test"], MATRIX)
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"experiment", "config", "versions", "runs", "summary"}
    assert content["config"] == {"epochs": 3, "strengths": [1.0]}
    assert {"jax", "optax", "device", "commit"} <= set(content["versions"])


def test_another_configuration_is_refused_and_overwrite_is_explicit(tmp_path):
    Record("e", Config(out=tmp_path)).add("si", RUN)
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(UserError, match="epochs: 3 there, 4 now"):
        Record("e", Config(out=tmp_path, epochs=4))
    with pytest.raises(UserError, match="another experiment, e"):
        Record("f", Config(out=tmp_path))
    assert (tmp_path / "results.json").read_text() == before
    assert Record("e", Config(out=tmp_path, epochs=4, overwrite=True)).runs == {}


def test_results_of_another_configuration_are_refused_without_config_json(tmp_path):
    Record("e", Config(out=tmp_path)).add("si", RUN)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="epochs: 3 there, 4 now"):
        Record("e", Config(out=tmp_path, epochs=4))


def test_a_setting_that_a_record_does_not_know_is_its_default(tmp_path):
    Record("e", Config(out=tmp_path)).add("si", RUN)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    del content["config"]["epochs"]
    path.write_text(json.dumps(content))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="epochs: 3 there, 4 now"):
        Record("e", Config(out=tmp_path, epochs=4))
    record = Record("e", Config(out=tmp_path))
    assert list(record.runs) == ["si"]
    assert record.content["config"] == {"epochs": 3, "strengths": [1.0]}


def test_a_record_of_another_jaxlib_says_so(tmp_path, capsys):
    Record("e", Config(out=tmp_path)).add("si", RUN)
    Record("e", Config(out=tmp_path))
    assert capsys.readouterr().err == ""
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content).replace(version("jaxlib"), "0.0.1"))
    Record("e", Config(out=tmp_path))
    assert f"jaxlib 0.0.1, here is {version('jaxlib')}" in capsys.readouterr().err
    content["runs"]["si"]["earlier_versions"] = [{"jaxlib": "0.0.2"}]
    path.write_text(json.dumps(content))
    Record("e", Config(out=tmp_path))
    assert "computed with jaxlib 0.0.2, here" in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_accelerators_precision_is_kept(platform, monkeypatch):
    device = types.SimpleNamespace(platform=platform, device_kind="one")
    monkeypatch.setattr("experiments.engine.record.jax.devices", lambda: [device])
    with jax.default_matmul_precision("highest"):
        found = versions()
    assert found["device"] == f"{platform}: one"
    expected = "highest" if platform == "gpu" else None
    assert found.get("matmul_precision") == expected


def test_a_method_finished_under_other_versions_says_so(tmp_path, monkeypatch):
    record = Record("e", Config(out=tmp_path))
    record.add("before", RUN)
    later = {**record.content["versions"], "jax": "99.0"}
    monkeypatch.setattr("experiments.engine.record.versions", lambda: later)
    record.add("after", RUN)
    assert "versions" not in record.runs["before"]
    assert record.runs["after"]["versions"]["jax"] == "99.0"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_is_said_whatever_is_written(tmp_path):
    record = Record("e", Config(out=tmp_path))
    for name in ("metrics.jsonl", "f.png", "results.part"):
        (tmp_path / name).symlink_to("/dev/full")
    figure = figures.heat_map([[1.0]], [1], [1], labels=("a", "b"), title="t")
    for write in (
        lambda: record.log(method="si", seeds="0-1", position=0),
        lambda: record.save("f", figure),
        lambda: record.add("si", RUN),
    ):
        with pytest.raises(UserError, match=r"No space left on device.* Make room"):
            write()


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    """Whose lock dies with it."""
    hold = """
import pathlib, sys, filelock
folder = pathlib.Path(sys.argv[1])
lock = filelock.FileLock(folder / ".lock")
lock.acquire()
(folder / ".holder").write_text("process 1 on there")
print("held", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=r"in use by process 1 on there\. Wait"):
        Record("e", Config(out=tmp_path))
    assert not (tmp_path / "config.json").exists()
    other.kill()
    other.communicate()
    Record("e", Config(out=tmp_path))
    Record("e", Config(out=tmp_path))  # of the same process
    assert f"process {os.getpid()}" in (tmp_path / ".holder").read_text()


def test_figures_are_written_as_they_are_styled(tmp_path):
    figure = figures.heat_map([[1.0]], [1], [1], labels=("a", "b"), title="t")
    Record("e", Config(out=tmp_path)).save("f", figure)
    width = int.from_bytes((tmp_path / "f.png").read_bytes()[16:20], "big")
    assert width == round(figure.get_figwidth() * STYLE["savefig.dpi"])


def test_damage_and_unwritable_folders_are_said(tmp_path):
    (tmp_path / "results.json").write_text('{"runs": ')
    with pytest.raises(UserError, match="damaged"):
        Record("e", Config(out=tmp_path))
    Record("e", Config(out=tmp_path, overwrite=True))
    (tmp_path / "results.json").write_text("{}")
    nowhere = tmp_path / "results.json" / "sub"
    for overwrite in (False, True):
        with pytest.raises(UserError, match="cannot write to --out"):
            Record("e", Config(out=nowhere, overwrite=overwrite))


def test_rewinding_takes_back_what_will_be_logged_again(tmp_path):
    record = Record("e", Config(out=tmp_path))
    for method in ("a", "b"):
        for position in range(3):
            record.log(method=method, seeds="0-1", position=position)
    record.log(method="b", seeds="2-3", position=1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"method": "b", "posi')  # cut off by a kill
    record.rewind("b", "0-1", 1)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert [(e["method"], e["position"]) for e in entries] == expected


def test_summary_and_table():
    test = summarize(RUN)["test"]
    spread = np.std([0.875, 0.625], ddof=1)
    assert test["average_accuracy"] == {
        "mean": 0.75,
        "sem": 0.125,
        "std": round(spread, 6),
        "n": 2,
    }
    assert test["forgetting"]["mean"] == 0.5
    text = table({"si": RUN}, "test", ["a", "b"])
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "si",
        "a 0.5000 ± 0.2500",
        "b 1.0000 ± 0.0000",
        "average 0.7500 ± 0.1250",
        "forgetting 0.5000 ± 0.2500",
    ]


def test_one_seed_has_no_spread():
    one = {"si": {"test": MATRIX[:1], "train": MATRIX[:1]}}
    assert "±" not in table(one, "test", ["a", "b"])
    assert over_seeds(one) == "one seed"
    found = summarize(one["si"])["test"]["average_accuracy"]
    assert found == {"mean": 0.875, "sem": None, "std": None, "n": 1}
    mixed = one | {"sgd": RUN}
    assert over_seeds(mixed) == "mean ± SEM, n = 1 to 2"
    assert table(mixed, "test", ["a", "b"]).splitlines()[-1].split() == ["n", "1", "2"]


RESULTS = Path(__file__).parent.parent / "experiments" / "results"
GONE = MATRIX.copy()
GONE[1, 1:] = np.nan  # the second seed, in the second task


def strict(text):
    """JSON as the standard has it: there is no NaN in it."""

    def no(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=no)


def test_a_run_that_diverged_is_marked_and_comes_back_as_it_was(tmp_path):
    """In another process, and when seeds are added."""
    record = Record("e", Config(out=tmp_path))
    loss = np.array([np.inf, np.nan, 0.5])
    record.log(method="si", seeds="0-2", position=0, loss=loss, drop=np.float32("nan"))
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert (line["loss"], line["drop"]) == ([None, None, 0.5], None)
    record.add("si", RUN | {"test": GONE})
    record.add("sgd", RUN)
    written = strict((tmp_path / "results.json").read_text())
    assert written["runs"]["si"]["test"][1][1] == [None, None]
    assert written["runs"]["si"]["diverged"] == [1]
    assert "diverged" not in written["runs"]["sgd"]
    assert written["summary"]["si"]["test"]["average_accuracy"] == {
        "mean": None,
        "sem": None,
        "std": None,
        "n": 2,
        "diverged": 1,
    }
    assert written["summary"]["si"]["train"] == written["summary"]["sgd"]["train"]
    assert ",1,test,average_accuracy,,,NaN" in (tmp_path / "results.csv").read_text()

    again = Record("e", Config(out=tmp_path))
    np.testing.assert_array_equal(again.runs["si"]["test"], GONE)
    rows = table(again.runs, "test", ["a", "b"]).splitlines()
    assert " ".join(rows[1].split()) == "a 1/2 diverged 0.5000 ± 0.2500"
    again.add("si", RUN | {"test": GONE})
    assert again.runs["si"]["diverged"] == [1, 3]
    assert strict((tmp_path / "results.json").read_text())["runs"]["si"]["parts"]


def test_where_all_seeds_diverged_there_is_one_word():
    assert cell([np.nan, np.nan]) == cell([np.inf]) == number(np.nan) == "diverged"
    assert cell([0.5, np.nan, np.nan]) == "2/3 diverged"


def test_what_diverged_is_never_the_best():
    assert choose([[np.nan, 0.1, 0.3, np.inf]], "si") == (2,)
    assert choose([[[np.nan, 0.1], [np.nan, -0.3]]], "si") == (0, 1)
    with pytest.raises(UserError, match="si diverged in all that was tried"):
        choose([[np.nan, np.nan]], "si")


def test_numbers_have_six_digits_however_small_or_large(tmp_path):
    record = Record("e", Config(out=tmp_path))
    values = np.array([1e-7, 1.23456789e-9, 0.1234567, 4194304.25, -0.0])
    record.log(method="si", seeds="0-0", position=10_000_019, loss=values)
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == [1e-7, 1.23457e-9, 0.123457, 4194300.0, 0.0]
    assert line["position"] == 10_000_019
    points = {"seed": np.array([1_000_001]), "damping": [1.23456789]}
    record.add("grid", {"points": points, "n": np.int64(10_000_019)}, lambda _: {})
    points = {"seed": [1_000_001], "damping": [1.23456789]}
    assert record.runs["grid"] == {"points": points, "n": 10_000_019}
    assert statistics(values[:1])["mean"] == 1e-7


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parent.parent / "experiments/results").glob("*.json")),
)
def test_committed_records_are_read_and_written_as_they_are(path, tmp_path):
    """Where runs have no fields, their names have them."""
    content = strict(path.read_text())
    runs = with_fields(content.get("runs", {}))
    for name, run in runs.items():
        if "method" in run:
            assert str(Label(**{k: run[k] for k in FIELDS if k in run})) == name
    record = Record("e", Config(out=tmp_path))
    record.content["runs"] = runs
    record.note("name", 1.0)
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == runs
    assert Record("e", Config(out=tmp_path)).runs == runs


def test_a_run_that_went_on_under_other_versions_names_both(tmp_path, monkeypatch):
    """Of those it shared its first task with, too; what was added later is a part."""
    record = Record("e", Config(out=tmp_path))
    here = record.content["versions"]
    older, newer = ({**here, "jaxlib": x} for x in ("0.0.1", "99.0"))
    record.keep_versions(["si seeds 0-1", "first task seeds 0-1"], [older, here])
    record = Record("e", Config(out=tmp_path))
    assert record.trained_by("first task seeds 0-1") == [older, here]
    assert record.trained_by("sgd seeds 0-1") == []
    record.add("si", RUN)
    record.add("sgd", RUN)
    assert record.runs["si"]["earlier_versions"] == [older]
    assert "versions" not in record.runs["si"]
    assert "earlier_versions" not in record.runs["sgd"]
    monkeypatch.setattr("experiments.engine.record.versions", lambda: newer)
    record.keep_versions(["si seeds 2-3"], [here, newer])
    record.add("si", RUN)
    found = Record("e", Config(out=tmp_path)).runs["si"]["parts"]
    names = [(x["versions"], x["earlier_versions"]) for x in found]
    assert names == [(here, [older]), (newer, [here])]
    assert Record("e", Config(out=tmp_path, overwrite=True)).trained_by("si") == []


def test_seeds_are_added_to_a_record_and_none_taken_away(tmp_path, monkeypatch):
    """In groups that end where others did, finished or under way."""
    first = {**RUN, "correlations": {"kernel": MATRIX}}
    record = Record("e", Config(out=tmp_path))
    record.add("si", first)
    before = record.content["versions"]
    later = {**before, "commit": "later"}
    monkeypatch.setattr("experiments.engine.record.versions", lambda: later)
    record = Record("e", Config(out=tmp_path))
    assert record.missing("si", 2) == []
    assert record.missing("si", 5) == [range(2, 5)]
    assert record.missing("new", 5) == [range(2), range(2, 5)]
    record.checkpoints("si seeds 2-2").save(1, {"x": np.zeros(1)})
    assert record.missing("si", 5) == [range(2, 3), range(3, 5)]
    with pytest.raises(UserError, match=r"holds 2 seeds of si.*--seeds 2 or more"):
        record.missing("si", 1)

    record.add(
        "si",
        {k: v[:1] if k != "seconds" else 2.0 for k, v in RUN.items()}
        | {"correlations": {"kernel": MATRIX[:1]}},
    )
    run = Record("e", Config(out=tmp_path)).runs["si"]
    together = np.concatenate([MATRIX, MATRIX[:1]])
    np.testing.assert_array_equal(run["test"], together)
    np.testing.assert_array_equal(run["correlations"]["kernel"], together)
    assert run["seconds"] == 3.5
    assert run["parts"] == [
        {"seeds": 2, "seconds": 1.5, "versions": before},
        {"seeds": 1, "seconds": 2.0, "versions": later},
    ]
    assert record.content["summary"]["si"] == summarize(
        RUN | {"test": together, "train": together, "initial": together[:, 0]}
    )
    assert record.missing("new", 3) == [range(2), range(2, 3)]
    grid = RUN | {"points": {"seed": [9, 9], "strength": [0.0, 1.0]}}
    other = Record("e", Config(out=tmp_path / "other"))
    other.add("grid", grid, lambda _: {})
    assert other.missing("new", 3) == [range(3)]


def test_methods_do_not_share_their_checkpoints(tmp_path):
    record = Record("e", Options(out=tmp_path))
    folders = {
        record.checkpoints(f"si c={c:g}")._folder for c in (1e6, 1e-6, 1.0, 10.0)
    }
    assert len(folders) == 4


def test_tables_are_aligned_where_characters_combine():
    rows = [["", "x"], ["θ̃", "1"], ["ab", "22"]]
    assert aligned(rows) == "     x\nθ̃    1\nab  22"


def test_words_keep_their_blanks(tmp_path):
    written = {"prompt": ["def f(x):\n    return [x,  1]", "a   b"]}
    Record("e", Config(out=tmp_path)).note("samples", written)
    assert Record("e", Config(out=tmp_path)).content["samples"] == written
