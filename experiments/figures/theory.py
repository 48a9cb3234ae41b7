"""Figures of the theory: the paper's Figs. 1 and 2, and what section 4 says.

Each function returns a Matplotlib figure of its data.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.figures.style import styled


@styled
def quadratic(
    errors: Mapping[str, Mapping[str, Any]],
    averaged: Mapping[str, Mapping[str, Any]],
    noisy: Mapping[str, Any],
    *,
    learning_rates: Sequence[float],
    batch_sizes: Sequence[int],
    noisy_learning_rates: Sequence[float],
) -> Figure:
    """Where ω is what the closed forms say, and where noise makes it more.

    Args:
      errors: for each kind of Hessian, ``"eq. 11"``: relative errors by learning rate.
      averaged: for each kind, ``"half the Hessian"``, ``"mean ω / σ²"`` and
        ``"median Ω"``, of each parameter.
      noisy: for each optimizer, ``"by batch size"`` and ``"by learning rate"``: Σω over
        the loss drop ``(points, seeds)``; a name that ends in "predicted" is a line.
      learning_rates: those of ``errors``.
      batch_sizes: those of ``noisy``.
      noisy_learning_rates: likewise.

    Returns:
      Four panels.
    """
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    (error, average), (by_batch, by_rate) = figure.subplots(2, 2)
    for (kind, series), marker in zip(
        errors.items(), itertools.cycle("os^D"), strict=False
    ):
        error.loglog(learning_rates, series["eq. 11"], label=kind, marker=marker)
        half = averaged[kind]["half the Hessian"]
        (points,) = average.plot(
            half, averaged[kind]["mean ω / σ²"], marker, label=kind, markersize=5
        )
        average.plot(
            half,
            averaged[kind]["median Ω"],
            marker,
            markersize=5,
            color=points.get_color(),
            fillstyle="none",
        )
    error.set_xlabel("learning rate η")
    error.set_ylabel("largest relative error")
    error.set_title("ω against eq. 11: the error falls with η")
    error.legend(frameon=False)
    top = max(max(series["half the Hessian"]) for series in averaged.values())
    average.plot([0, top], [0, top], color="0.6", zorder=0, linewidth=1)
    average.set_xlabel("H/2, diagonal")
    average.set_ylabel("⟨ω⟩/σ² (filled), median of Ω (open)")
    average.set_title("averaged over starts (eq. 12)")
    for panel, by, values in (
        (by_batch, "by batch size", batch_sizes),
        (by_rate, "by learning rate", noisy_learning_rates),
    ):
        for (name, ratios), marker in zip(
            ((k, v) for k, v in noisy.items() if isinstance(v, Mapping)),
            itertools.cycle("os^D"),
            strict=False,
        ):
            ratio = np.asarray(ratios[by]).mean(1)
            if name.endswith("predicted"):
                panel.plot(values, ratio, "k:", label=name)
            else:
                panel.plot(values, ratio, marker=marker, label=name)
        panel.axhline(1, color="0.6", linewidth=1, zorder=0)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylabel("Σω / loss drop")
        panel.legend(frameon=False)
    by_batch.set_xscale("log", base=2)
    by_batch.set_xlabel("batch size")
    by_batch.set_title(f"minibatch noise, η = {noisy['learning rate']:g}")
    by_rate.set_xlabel("learning rate η (momentum, Adam: η/10)")
    by_rate.set_title(f"minibatch noise, batch size {noisy['batch size']}")
    return figure


@styled
def trajectories(
    x: ArrayLike,
    y: ArrayLike,
    losses: Sequence[ArrayLike],
    paths: Mapping[str, ArrayLike],
) -> Figure:
    """Fig. 1: the losses of two tasks as heat maps, and the ways through them.

    The shades are of the losses' square roots, in which a valley can be seen.

    Args:
      x: ``(columns,)``, values of the first parameter.
      y: ``(rows,)``, of the second.
      losses: of each task, ``(rows, columns)``.
      paths: for each method, ``(tasks, points, 2)``: where each task led.

    Returns:
      A panel a task.
    """
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(losses), sharex=True, sharey=True)
    for task, (panel, loss) in enumerate(zip(panels, losses, strict=True)):
        panel.contourf(x, y, np.sqrt(np.asarray(loss)), 20, cmap="Blues")
        # The methods share their way through the first task.
        first = np.asarray(next(iter(paths.values())))[0]
        panel.plot(*first.T, color="tab:green", linewidth=2.5, label="task 1")
        for (name, path), color in zip(
            paths.items(), ("black", "tab:orange"), strict=True
        ):
            second = np.asarray(path)[1]
            panel.plot(*second.T, color=color, linewidth=2, label=f"task 2, {name}")
            panel.plot(*second[-1], "o", color=color)
        panel.plot(*first[0], "o", color="tab:green")
        panel.annotate("θ(t₀)", first[0], (5, -4), textcoords="offset points")
        panel.plot(*first[-1], "o", color="tab:green")
        panel.annotate("θ(t₁)", first[-1], (5, 4), textcoords="offset points")
        panel.set_title(f"Loss of task {task + 1}")
        panel.set_xlabel("θ₁")
    panels[0].set_ylabel("θ₂")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


@styled
def surrogate(curves: Mapping[str, Any]) -> Figure:
    """Fig. 2: a loss, its surrogate and the quadratic of its Hessian.

    Args:
      curves: on the ``"grid"`` of the parameter ``"loss"``, ``"surrogate"`` and
        ``"hessian"``; and ``"start"`` and ``"end"``: parameter, loss and surrogate.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.subplots()
    grid = curves["grid"]
    axes.plot(grid, curves["loss"], "k", label="loss of task 1")
    axes.plot(grid, curves["surrogate"], "tab:green", label="surrogate loss")
    axes.plot(
        grid, curves["hessian"], color="tab:purple", linestyle="--", label="Hessian"
    )
    for name, text, offset in (
        ("start", "θ(0)", (4, 5)),
        ("end", "θ(T)", (5, -12)),
    ):
        parameter, loss, _ = curves[name]
        axes.plot(parameter, loss, "ko", markersize=5)
        axes.annotate(text, (parameter, loss), offset, textcoords="offset points")
    axes.set_ylim(-0.15, 1.15 * max(curves["loss"]))
    axes.set_xlabel("θ")
    axes.set_ylabel("Loss")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
