"""What is forgotten over what is learned."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.figures.style import COLOURS, STYLE, error_of, labelled, styled


@styled
def frontier(
    curves: Mapping[str, ArrayLike],
    *,
    start: ArrayLike,
    labels: Sequence[str],
    suptitle: str | None = None,
) -> Figure:
    """What each method keeps over what it learns: a curve a method, low is good.

    Args:
      curves: for each method, losses ``(seeds, points, 2)`` on the new task and on the
        old one.
      start: ``(seeds, 2)``, before the new task was learned.
      labels: what the two losses are.
      suptitle: a line over the figure.

    Returns:
      The figure; bars are the standard error over the seeds.

    Example:
      >>> from experiments.finetune import figures
      >>> curves = {"si": [[[2.0, 1.1], [1.5, 1.6]]]}  # a seed, two strengths
      >>> figure = figures.frontier(curves, start=[[3.0, 1.0]], labels=["new", "old"])
      >>> print(len(figure.axes[0].containers))
      2
    """
    figure = Figure(figsize=(6.2, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = itertools.cycle(itertools.product(("-", "--"), "os^Dvp*X"))
    colours = itertools.cycle([*COLOURS, "navy", "black"])
    for (name, values), (line, marker), colour in zip(
        curves.items(), styles, colours, strict=False
    ):
        x, y = np.moveaxis(np.asarray(values), -1, 0)
        axes.errorbar(
            x.mean(0),
            y.mean(0),
            error_of(y),
            error_of(x),
            label=labelled(name, np.stack([x, y])),
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=3.5,
            capsize=1.5,
            elinewidth=0.8,
        )
    x, y = np.asarray(start).T
    axes.errorbar(
        x.mean(),
        y.mean(),
        error_of(y),
        error_of(x),
        fmt="k*",
        markersize=9,
        label="pretrained",
    )
    axes.axhline(y.mean(), color="0.6", linestyle=":", linewidth=1, zorder=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    figure.legend(loc="outside right center", frameon=False)
    return figure


@styled
def law(
    points: Mapping[str, ArrayLike], *, labels: Sequence[str], suptitle: str
) -> Figure:
    """What each method forgets over how far it went, on logarithmic axes.

    Args:
      points: for each method ``(seeds, points, 2)``, the KL divergence from the
        pretrained network on the new text, and how much the loss on the old one grew;
        means with the pretrained network behind a comma. Points of which one is not
        above 0 are left out.
      labels: what the two are.
      suptitle: a line over the figure.

    Returns:
      The figure, of means over the seeds; bars are the standard error. The first of the
      methods is joined by a line.

    Example:
      >>> from experiments.finetune import figures
      >>> points = {"si": [[[0.1, 0.01], [1.0, 0.2]]]}  # a seed, two strengths
      >>> figure = figures.law(points, labels=["KL", "growth"], suptitle="")
      >>> print(figure.axes[0].get_xscale())
      log
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    families = dict.fromkeys(map(_family, points))
    colours = dict(zip(families, itertools.cycle(_COLOURS), strict=False))
    for name, values in points.items():
        x, y = np.moveaxis(np.asarray(values, np.float64), -1, 0)
        shown = (x.mean(0) > 0) & (y.mean(0) > 0)
        x, y = x[:, shown], y[:, shown]
        axes.errorbar(
            x.mean(0),
            y.mean(0),
            error_of(y),
            error_of(x),
            label=name,
            color=colours[_family(name)],
            marker={"interpolated": "s", "merged": "D"}.get(name.split(", ")[-1], "o"),
            markerfacecolor="none" if ", " in name else None,
            linestyle="-" if name == next(iter(points)) else "",
            markersize=4,
            elinewidth=0.8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Nearer to the pretrained network the loss grows by less than it can be measured.
    axes.set_xlim(left=max(axes.get_xlim()[0], axes.get_xlim()[1] / 100))
    axes.set_ylim(bottom=max(axes.get_ylim()[0], axes.get_ylim()[1] / 200))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.suptitle(suptitle, fontsize=STYLE["font.size"])
    figure.legend(loc="outside right center", frameon=False)
    return figure


_COLOURS = ("black", *COLOURS, "navy", "olive", "gold")


def _family(name: str) -> str:
    """Whose means have the colour of it."""
    return name.split(", ")[0]
