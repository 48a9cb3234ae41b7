"""The paper's figures. Each function returns a Matplotlib figure of its data."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from experiments.figures.style import (
    STYLE,
    colours_of,
    error_of,
    finite_of,
    labelled,
    styled,
)
from si_jax import metrics


@styled
def heat_map(
    values: ArrayLike,
    rows: Sequence[float],
    columns: Sequence[float],
    *,
    labels: tuple[str, str],
    title: str,
    chosen: tuple[int, int] | None = None,
) -> Figure:
    """Accuracy over a grid of two hyperparameters, each value written in its cell.

    Args:
      values: ``(rows, columns)``, NaN where a run diverged.
      rows: the values of the hyperparameter on the vertical axis.
      columns: those of the one on the horizontal axis.
      labels: the two hyperparameters' names.
      title: a line over the figure.
      chosen: row and column of a cell to frame.

    Returns:
      The figure.

    Example:
      >>> from experiments import figures
      >>> figure = figures.heat_map(
      ...     [[0.9, 0.8]], [1.0], [0.1, 1.0], labels=("c", "ξ"), title="held out"
      ... )
      >>> print(figure.axes[0].get_title())
      held out
    """
    values = np.asarray(values)
    size = (0.9 * len(columns) + 1.5, 0.5 * len(rows) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis")
    finite = values[np.isfinite(values)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            f"{value:.4f}" if np.isfinite(value) else "diverged",
            ha="center",
            va="center",
            color="white" if value < middle else "black",
        )
    if chosen is not None:
        corner = (chosen[1] - 0.5, chosen[0] - 0.5)
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2)
        axes.add_patch(frame)
    axes.set_yticks(range(len(rows)), [f"{x:g}" for x in rows])
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    axes.set_title(title)
    figure.colorbar(image)
    return figure


@styled
def accuracy_by_task(
    matrices: Mapping[str, ArrayLike],
    titles: Sequence[str],
    *,
    chance: float,
    methods: Mapping[str, str] | None = None,
    suptitle: str | None = None,
) -> Figure:
    """Fig. 3: each task's accuracy as more tasks are learned, and their average.

    Args:
      matrices: for each method, accuracies ``(seeds, tasks, tasks)``: after each task
        (rows), on each task (columns); NaN of a run that diverged.
      titles: a title for each task.
      chance: the accuracy of guessing.
      methods: whose run each is, for its colour, if it is not called like it.
      suptitle: a line over the figure.

    Returns:
      A panel a task and one for the average over the tasks so far; bars are the
      standard error over the seeds.

    Example:
      >>> from experiments import figures
      >>> accuracy = [[[0.9, 0.5], [0.8, 0.9]]]  # a seed, two tasks
      >>> figure = figures.accuracy_by_task({"si": accuracy}, ["1", "2"], chance=0.5)
      >>> print(len(figure.axes))
      3
    """
    count = len(titles)
    figure = Figure(figsize=(1.4 * (count + 1) + 0.3, 2.7), layout="constrained")
    panels = figure.subplots(1, count + 1, sharex=True, sharey=True)
    after = np.arange(1, count + 1)
    lowest = chance
    colours = colours_of(matrices, methods)
    for (name, values), marker in zip(
        matrices.items(), itertools.cycle("os^Dv"), strict=False
    ):
        matrix = np.asarray(values)
        so_far = np.asarray(metrics.average_accuracy_so_far(matrix))
        curves = [(k, matrix[:, k:, k]) for k in range(count)] + [(0, so_far)]
        for panel, (first, curve) in zip(panels, curves, strict=True):
            error = error_of(curve)
            lowest = min([lowest, *finite_of(curve.mean(0) - error)])
            panel.errorbar(
                after[first:],
                curve.mean(0),
                error,
                label=labelled(name, matrix),
                color=colours[name],
                marker=marker,
                markersize=3,
                capsize=2,
            )
    for panel, title in zip(panels, [*titles, "Average"], strict=True):
        panel.axhline(chance, color="0.6", linestyle=":", linewidth=1, zorder=0)
        panel.set_title(title)
        panel.set_xticks(after)
        panel.set_xlabel("Tasks learned")
    panels[0].set_ylim(lowest - 0.05, 1.02)
    panels[0].set_ylabel("Accuracy")
    panels[0].annotate(
        "chance", (1, chance), (0, 2), textcoords="offset points", color="0.4"
    )
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(matrices), 5),
        frameon=False,
    )
    return figure


@styled
def final_accuracy(
    bars: Mapping[str, Mapping[str, ArrayLike]],
    titles: Sequence[str],
    *,
    chance: float,
    published: Mapping[str, Sequence[float]] | None = None,
    methods: Mapping[str, str] | None = None,
    suptitle: str | None = None,
) -> Figure:
    """Fig. 6: each task's accuracy after all of them, as grouped bars.

    Args:
      bars: for each panel and method, accuracies ``(seeds, tasks)``.
      titles: a title for each task.
      chance: the accuracy of guessing.
      published: a method's accuracies ``(tasks,)`` that its authors found, for the
        first panel: diamonds on its bars.
      methods: whose run each is, for its colour, if it is not called like it.
      suptitle: a line over the figure.

    Returns:
      A panel over the other; error bars are the standard deviation over the seeds.

    Example:
      >>> from experiments import figures
      >>> bars = {"Test": {"si": [[0.8, 0.9]], "fine-tuning": [[0.5, 0.9]]}}
      >>> figure = figures.final_accuracy(bars, ["1", "2"], chance=0.5)
      >>> print(len(figure.axes[0].patches))
      4
    """
    size = (max(1.1 * len(titles) + 1.2, 5.5), 2.1 * len(bars) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(bars), 1, sharex=True, sharey=True, squeeze=False
    ).ravel()
    authors: list[tuple[np.ndarray, Sequence[float]]] = []
    for panel, (label, arms) in zip(panels, bars.items(), strict=True):
        width = 0.8 / len(arms)
        colours = colours_of(arms, methods)
        for i, (method, values) in enumerate(arms.items()):
            accuracy = np.asarray(values)
            places = np.arange(len(titles)) + (i - (len(arms) - 1) / 2) * width
            if panel is panels[0] and method in (published or {}):
                authors.append((places, (published or {})[method]))
            panel.bar(
                places,
                accuracy.mean(0),
                width,
                color=colours[method],
                yerr=accuracy.std(0, ddof=1) if len(accuracy) > 1 else None,
                capsize=2,
                error_kw={"linewidth": 0.8},
                label=labelled(method, accuracy),
            )
        panel.axhline(chance, color="0.3", ls=":", linewidth=1, label="chance")
        panel.set_ylabel(label)
    if authors:
        places, values = map(np.concatenate, zip(*authors, strict=True))
        panels[0].plot(
            places, values, "D", color="k", mfc="w", ms=3.5, label="authors' data"
        )
    panels[-1].set_xticks(range(len(titles)), titles)
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=int(size[0] / 1.25),  # inches of an entry
        frameon=False,
    )
    return figure


@styled
def average_accuracy(
    curves: Mapping[str, ArrayLike],
    *,
    single: ArrayLike | None = None,
    joint: ArrayLike | None = None,
    published: Mapping[str, ArrayLike] | None = None,
    methods: Mapping[str, str] | None = None,
    suptitle: str | None = None,
) -> Figure:
    """Fig. 4: accuracy, averaged over the tasks so far, against their number.

    Args:
      curves: for each method, ``(seeds, tasks)``.
      single: ``(seeds,)``, accuracy of networks that learn one task only, a dotted
        line.
      joint: ``(seeds,)``, accuracy of networks that learn all tasks at once, a dashed
        line.
      published: a method's ``(tasks,)`` that its authors found, NaN where they do not
        say: crosses in its colour.
      methods: whose run each is, for its colour, if it is not called like it.
      suptitle: a line over the figure.

    Returns:
      The whole, and above it its upper part enlarged; bands are the standard error over
      the seeds.

    Example:
      >>> from experiments import figures
      >>> figure = figures.average_accuracy({"si": [[0.98, 0.96]]}, single=[0.98])
      >>> print(len(figure.axes))
      2
    """
    figure = Figure(figsize=(4.4, 5.2), layout="constrained")
    zoom, whole = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    tasks = 1
    colours = colours_of(curves, methods)
    for (name, values), marker in zip(
        curves.items(), itertools.cycle("os^Dv"), strict=False
    ):
        curve = np.asarray(values)
        tasks = max(tasks, curve.shape[1])
        after = np.arange(1, curve.shape[1] + 1)
        mean, error = curve.mean(0), error_of(curve)
        for panel in (zoom, whole):
            panel.plot(
                after,
                mean,
                label=labelled(name, curve),
                color=colours[name],
                marker=marker,
                markersize=3,
            )
            panel.fill_between(
                after,
                mean - error,
                mean + error,
                color=colours[name],
                alpha=0.2,
                linewidth=0,
            )
            if name in (published or {}):
                theirs = np.asarray((published or {})[name])
                panel.plot(
                    np.arange(1, len(theirs) + 1),
                    theirs,
                    "x",
                    color=colours[name],
                )
    if set(published or {}) & set(curves):
        whole.plot([], [], "kx", label="authors' data")
    for panel in (zoom, whole):
        for control, label, style in (
            (joint, "all tasks at once", "--"),
            (single, "single task", ":"),
        ):
            if control is not None:
                named = labelled(label, np.asarray(control))
                level = float(np.asarray(control).mean())
                panel.axhline(level, color="0.4", linestyle=style, label=named)
        panel.set_ylabel("Average accuracy")
    # The upper part: about the best method and what it might reach.
    means = [np.asarray(x).mean(0) for x in curves.values()]
    ends = finite_of([mean[-1] for mean in means])
    controls = [np.mean(np.asarray(x)) for x in (single, joint) if x is not None]
    every = finite_of(np.concatenate([*means, controls]))
    if ends:
        top = max(every)
        zoom.set_ylim(2 * max(ends) - top - 0.01, top + 0.003)
    lowest = min(finite_of(np.concatenate(means)), default=1.0)
    whole.set_ylim(min(0.4, lowest - 0.02), 1.02)
    whole.set_xticks(range(1, tasks + 1))
    whole.set_xlabel("Tasks learned")
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    figure.legend(
        *whole.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """A square matrix with NaN on its diagonal, which is left blank."""
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


@styled
def correlations(matrices: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Fig. 5: how the importances ω of different tasks correlate.

    Args:
      matrices: for each method and layer, ``(tasks, tasks)``.

    Returns:
      A row a method, a column a layer.

    Example:
      >>> from experiments import figures
      >>> matrix = [[1.0, 0.2], [0.2, 1.0]]
      >>> figure = figures.correlations({"si": {"Hidden layer 1": matrix}})
      >>> print(figure.axes[0].get_title())
      Hidden layer 1
    """
    rows, columns = len(matrices), max(map(len, matrices.values()))
    others = {
        method: {
            layer: _off_diagonal(np.asarray(matrix)) for layer, matrix in layers.items()
        }
        for method, layers in matrices.items()
    }
    every = [np.abs(x).ravel() for of in others.values() for x in of.values()]
    # One scale for all panels, white at 0.
    limit = max(finite_of(np.concatenate(every)), default=1.0)
    size = (2.2 * columns + 0.8, 2.2 * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, (method, layers) in enumerate(others.items()):
        for panel, (layer, values) in zip(panels[i], layers.items(), strict=False):
            ends = (0.5, len(values) + 0.5)
            image = panel.imshow(
                values,
                vmin=-limit,
                vmax=limit,
                cmap="RdBu_r",
                extent=(*ends, *ends[::-1]),
            )
            panel.set_xticks(range(1, len(values) + 1))
            panel.set_yticks(range(1, len(values) + 1))
            panel.spines[["top", "right"]].set_visible(True)
            if i == 0:
                panel.set_title(layer)
            if i == rows - 1:
                panel.set_xlabel("Task")
        panels[i, 0].set_ylabel(f"{method}\nTask")
    figure.colorbar(image, ax=panels, label="Correlation of ω", shrink=0.8)
    return figure
