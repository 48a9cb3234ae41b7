import numpy as np
import pytest

from experiments import figures
from experiments.benchmark.figures import ratios
from experiments.finetune.figures import frontier
from experiments.scenarios.figures import scenarios


def test_accuracy_by_task_draws_each_task_from_when_it_was_learned():
    matrix = np.array([[[0.9, 0.5], [0.7, 1.0]], [[1.0, 0.5], [0.9, 1.0]]])
    figure = figures.accuracy_by_task(
        {"a": matrix, "b": matrix[:1]}, ["one", "two"], chance=0.5
    )
    panels = figure.axes
    assert [p.get_title() for p in panels] == ["one", "two", "Average"]
    curves = [p.containers[0].lines[0].get_xydata().tolist() for p in panels]
    np.testing.assert_allclose(curves[0], [[1, 0.95], [2, 0.8]])
    np.testing.assert_allclose(curves[1], [[2, 1.0]])
    np.testing.assert_allclose(curves[2], [[1, 0.95], [2, 0.9]], rtol=1e-6)
    for panel in panels:
        assert any(line.get_ydata()[0] == 0.5 for line in panel.lines), "chance line"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]


def test_ratios_have_a_bar_and_its_number_each():
    groups = {"net": {"adam": 1.0, "wrapper": 1.25}, "update": {"link": 3.5}}
    net, update = ratios(groups, label="time").axes
    assert [bar.get_width() for bar in net.patches] == [1.0, 1.25]
    assert [t.get_text() for t in net.texts] == ["1.00", "1.25"]
    assert [t.get_text() for t in net.get_yticklabels()] == ["adam", "wrapper"]
    assert update.get_xlabel() == "time"


def test_a_methods_colour_is_the_same_in_every_figure_of_accuracy():
    matrix, bars = np.full((1, 2, 2), 0.9), np.full((1, 2), 0.9)

    def lines(*names):
        figure = figures.average_accuracy(dict.fromkeys(names, bars))
        return {line.get_label(): line.get_color() for line in figure.axes[1].lines}

    two = lines("fine-tuning", "si c=1")
    three = lines("si c=0.1", "si c=1", "fine-tuning", "mine")
    assert three["fine-tuning"] == two["fine-tuning"]
    assert three["si c=0.1"] == two["si c=1"], "the first strength"
    assert len(set(three.values())) == 4, "a shade a strength, and another's own"

    fig_3 = figures.accuracy_by_task({"fine-tuning": matrix}, ["1", "2"], chance=0.5)
    assert fig_3.axes[0].containers[0].lines[0].get_color() == two["fine-tuning"]
    fig_6 = figures.final_accuracy({"": {"fine-tuning": bars}}, ["1", "2"], chance=0.5)
    assert fig_6.axes[0].patches[0].get_facecolor()[:3] == two["fine-tuning"]
    panels = scenarios({"": {"fine-tuning": matrix}})
    assert panels.axes[0].lines[0].get_color() == two["fine-tuning"]


@pytest.mark.parametrize("tasks", [2, 6])
def test_figure_6_has_room_for_its_title_and_legend(tasks):
    methods = ("si c=0.01", "si c=0.1", "fine-tuning", "from scratch")
    figure = figures.final_accuracy(
        {"Validation accuracy": dict.fromkeys(methods, np.full((3, tasks), 0.5))},
        ["CIFAR-100\n0–9"] * tasks,
        chance=0.2,
        published={"fine-tuning": [0.5] * tasks},
        suptitle="Split CIFAR-10 after all tasks, the authors' reset of Adam, "
        "mean ± SD, n = 3",
    )
    figure.draw_without_rendering()
    for drawn in (*figure.texts, *figure.legends):
        extent = drawn.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1


def test_what_diverged_is_named_and_the_rest_is_drawn_as_ever():
    good = np.array([[[0.9, 0.5], [0.7, 1.0]]])
    gone, curve = np.full_like(good, np.nan), np.array([[0.9, 0.8]])
    for both in ({"a": gone, "b": good}, {"b": good, "a": gone}):
        for figure in (
            figures.accuracy_by_task(both, ["1", "2"], chance=0.5),
            scenarios({"one": both, "other": {"b": good}}),
            scenarios({"one": {"b": good}, "other": both}),
            figures.final_accuracy(
                {"": {k: x[:, -1] for k, x in both.items()}}, ["1", "2"], chance=0.5
            ),
            figures.average_accuracy(
                {k: x[:, -1] for k, x in both.items()}, joint=[np.nan]
            ),
            frontier(both, start=[[1.0, 2.0]], labels=["x", "y"]),
        ):
            figure.draw_without_rendering()
            names = {text.get_text() for text in figure.legends[0].get_texts()}
            assert {"a (diverged)", "b"} <= names
    alone, beside = (
        figures.average_accuracy({"b": curve} | more)
        for more in ({}, {"a": np.full_like(curve, np.nan)})
    )
    for panel, same in zip(alone.axes, beside.axes, strict=True):
        assert panel.get_ylim() == same.get_ylim()
    figures.average_accuracy({"a": gone[:, -1]}).draw_without_rendering()

    for values in ([[0.9, np.nan]], [[np.nan, np.nan]]):
        figure = figures.heat_map(values, [1], [1, 2], labels=("c", "ξ"), title="t")
        figure.draw_without_rendering()
        assert figure.axes[0].texts[1].get_text() == "diverged"
    figures.correlations({"a": {"layer": gone[0]}}).draw_without_rendering()
