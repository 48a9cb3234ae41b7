"""What other programs read: CSV and TensorBoard."""

import csv
import io
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from experiments.engine import export
from experiments.engine.command import Options, UserError
from experiments.engine.record import Record
from experiments.engine.run import Label

MATRIX = np.array([[[1.0, 0.5], [0.75, 1.0]], [[1.0, 0.5], [0.25, 1.0]]])
RUN = {"test": MATRIX, "train": MATRIX / 2, "initial": MATRIX[:, 0] / 4, "seconds": 1.5}


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_every_observation_is_a_row():
    found = rows(export.tidy({"si c=1": RUN}))
    assert tuple(found[0]) == export.COLUMNS
    assert len(found) == 2 * ((2 + 4 + 5) + (4 + 4))  # the first 2 untrained
    second = {
        (x["split"], x["measure"], x["after"], x["task"]): float(x["value"])
        for x in found
        if (x["name"], x["seed"]) == ("si c=1", "1")
    }
    assert second["test", "accuracy", "0", "2"] == 0.125
    assert second["test", "accuracy", "2", "1"] == 0.25
    assert second["train", "accuracy", "2", "1"] == 0.125
    assert second["test", "average_accuracy", "", ""] == 0.625
    assert second["test", "learning_accuracy", "", ""] == 1.0
    assert second["test", "forgetting", "", ""] == 0.75
    assert second["test", "backward_transfer", "", ""] == -0.75
    assert second["test", "forward_transfer", "", ""] == 0.375


def test_what_a_run_is_stands_in_columns():
    label = Label("si", 100.0, scenario="class", batch_size=64)
    (row, *_) = rows(export.tidy({str(label): label.fields() | RUN}))
    wanted = ("class: batch 64: si c=100", "si", "100.0", "", "class", "64", "")
    assert tuple(row[k] for k in ("name", *export.FIELDS)) == wanted


def test_a_single_stage_has_no_measures_of_order():
    joint = {"test": MATRIX[:, 1:], "train": MATRIX[:, 1:]}
    measures = {row["measure"] for row in rows(export.tidy({"joint": joint}))}
    assert measures == {"accuracy", "average_accuracy"}


def test_a_grid_names_its_points():
    points = {"seed": [7, 7], "strength": [1.0, 100.0], "damping": [0.1, 0.1]}
    found = rows(export.tidy({"grid": RUN | {"points": points}}))
    columns = ("name", "strength", "damping", "scenario", "seed")
    assert {tuple(row[k] for k in columns) for row in found} == {
        ("grid", "1.0", "0.1", "", "7"),
        ("grid", "100.0", "0.1", "", "7"),
    }


def test_the_record_keeps_a_table_beside_the_json(tmp_path):
    record = Record("e", Options(out=tmp_path))
    record.add("measured elsewhere", {"correlations": [1.0]}, lambda _: {})
    path = tmp_path / "results.csv"
    assert not path.exists()
    record.add("si", RUN)
    record.add("si", RUN)
    assert {row["seed"] for row in rows(path.read_text())} == set("0123")
    Record("e", Options(out=tmp_path, overwrite=True))
    assert not path.exists()


class Writer:
    """In the place of TensorBoard's."""

    made: ClassVar[list] = []

    def __init__(self, folder, **options):
        self.folder, self.options, self.scalars = folder, options, []
        self.made.append(self)

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_run(tmp_path, monkeypatch):
    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setattr(Writer, "made", [])
    record = Record("e", Options(out=tmp_path, tensorboard=True))
    for position in (5, 6):
        values = {"task": 1, "loss": np.array([0.5, 0.25]), "negative": None}
        record.log(method="si c=1", seeds="0-1", position=position, **values)
    record.add("si c=1", RUN)
    first, second = Writer.made
    assert second.folder.endswith("tensorboard/si-c=1-seeds-0-1/run-1")
    assert first.options == {"purge_step": 5}
    assert first.closed
    assert second.closed
    assert second.scalars[:2] == [("loss", 0.25, 5), ("loss", 0.25, 6)]
    assert ("test/task_1", 0.25, 2) in second.scalars
    assert len(second.scalars) == 2 + 4 + 4
    record.add("what no network learned", {"slope": 1.0}, lambda _: {})
    assert len(Writer.made) == 2


def test_tensorboard_writes_what_it_can_read(tmp_path):
    pytest.importorskip("tensorboardX")
    board = export.TensorBoard(tmp_path)
    board.log("si", "0-0", 0, {"loss": np.ones(1)})
    board.add("si", "0-0", {"test": MATRIX[:1], "train": MATRIX[:1]})
    (events,) = tmp_path.glob("si-seeds-0-0/run-0/events.*")
    assert b"test/task_2" in events.read_bytes()


def test_without_its_writer_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tensorboard\]"'):
        Record("e", Options(out=tmp_path, tensorboard=True))
