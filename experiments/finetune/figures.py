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
    styles = itertools.product(("-", "--"), "os^Dvp*X")
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
