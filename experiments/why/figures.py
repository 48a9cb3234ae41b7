"""Correlations of all pairs, and what a batch size does."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.figures.style import COLOURS, STYLE, styled
from si_jax import metrics


@styled
def pairs(
    rows: Mapping[str, Mapping[str, Mapping[str, ArrayLike]]],
    names: Sequence[str],
    *,
    suptitle: str | None = None,
) -> Figure:
    """How importances correlate, by layer: ranks below the diagonal, values above it.

    Args:
      rows: for each row and column of panels ``"rank"`` and ``"linear"``, correlations
        ``(names, names)``.
      names: of the importances.
      suptitle: a line over the figure.

    Returns:
      A panel a row and column, the correlations written in the cells.
    """
    width = 0.36 * len(names)
    columns = max(map(len, rows.values()))
    size = (width * columns + 1.8, width * len(rows) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(rows), columns, squeeze=False, sharex=True, sharey=True
    )
    for line, (title, layers) in zip(panels, rows.items(), strict=True):
        for panel, (column, both) in zip(line, layers.items(), strict=True):
            lower = np.tri(len(names), k=-1, dtype=bool)
            values = np.where(lower, both["rank"], both["linear"])
            values[np.eye(len(names), dtype=bool)] = np.nan
            image = panel.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
            for (i, j), value in np.ndenumerate(values):
                if i != j:
                    text = f"{value:.2f}".replace("0.", ".", 1)
                    colour = "white" if abs(value) > 0.7 else "black"
                    panel.text(
                        j, i, text, ha="center", va="center", fontsize=5, c=colour
                    )
            panel.set_xticks(range(len(names)), names, rotation=90)
            panel.set_yticks(range(len(names)), names)
            panel.set_title(column)
        line[0].set_ylabel(title)
    label = "correlation: of ranks below, of values above"
    figure.colorbar(image, ax=panels, label=label, shrink=0.6)
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    return figure


@styled
def by_batch_size(
    bias: Mapping[str, Mapping[int, ArrayLike]],
    accuracy: Mapping[str, Mapping[int, ArrayLike]],
    *,
    suptitle: str | None = None,
) -> Figure:
    """The bias of ω, and the accuracy with several importances, by batch size.

    Args:
      bias: for each source and batch size the share of Σω, ``(networks,)``.
      accuracy: for each importance and batch size ``(seeds,)``.
      suptitle: a line over the figure.

    Returns:
      Two panels; bars are the standard error.
    """

    def draw(panel: Any, by_size: Mapping[int, ArrayLike], **style: Any) -> None:
        sizes = sorted(by_size)
        values = [np.asarray(by_size[size]) for size in sizes]
        error = [np.nan_to_num(np.asarray(metrics.standard_error(x))) for x in values]
        mean = np.array([x.mean() for x in values])
        panel.errorbar(np.array(sizes), mean, error, markersize=4, capsize=2, **style)

    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, by_size), marker in zip(bias.items(), itertools.cycle("os^D")):
        draw(left, by_size, label=name, color="k", marker=marker, mfc="w")
    left.legend(frameon=False)
    left.axhline(0, color="0.6", linewidth=1, zorder=0)
    left.set_ylabel("share of the bias in Σω")
    for (name, by_size), (marker, colour) in zip(
        accuracy.items(),
        zip(itertools.cycle("os^DvPX"), COLOURS, strict=False),
        strict=False,
    ):
        draw(right, by_size, label=name, marker=marker, color=colour)
    right.set_ylabel("test accuracy after all tasks")
    sizes = sorted(set().union(*bias.values()))
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("batch size")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    return figure
