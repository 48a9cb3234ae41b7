"""A panel a scenario."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.figures.style import STYLE, colours_of, error_of, labelled, styled
from si_jax import metrics


@styled
def scenarios(
    panels: Mapping[str, Mapping[str, ArrayLike]], *, suptitle: str | None = None
) -> Figure:
    """Accuracy, averaged over the tasks so far, in several scenarios.

    Args:
      panels: for each scenario and method, accuracies ``(seeds, tasks, tasks)``: after
        each task (rows), on each task (columns); ``(seeds, 1, tasks)`` of a method that
        learns all tasks at once.
      suptitle: a line over the figure.

    Returns:
      A panel a scenario, a line a method, dashed if it learns all tasks at once; bands
      are the standard error over the seeds.

    Example:
      >>> from experiments.scenarios import figures
      >>> accuracy = [[[0.9, 0.5], [0.8, 0.9]]]  # a seed, two tasks
      >>> figure = figures.scenarios({"task": {"si": accuracy}, "class": {}})
      >>> print([panel.get_title() for panel in figure.axes])
      ['task', 'class']
    """
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    markers = dict(zip(names, itertools.cycle("os^DvPX"), strict=False))
    colours = colours_of(names)
    size = (2.3 * len(panels) + 0.3, 2.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
    lines = {}
    for panel, (title, methods) in zip(axes[0], panels.items(), strict=True):
        for name, values in methods.items():
            matrix, colour = np.asarray(values), colours[name]
            if matrix.shape[1] == 1 < matrix.shape[2]:
                level = matrix.mean()
                lines[name] = panel.axhline(level, color="0.4", linestyle="--")
                continue
            curve = np.asarray(metrics.average_accuracy_so_far(matrix))
            after = np.arange(1, curve.shape[1] + 1)
            mean, error = curve.mean(0), error_of(curve)
            (lines[name],) = panel.plot(
                after, mean, color=colour, marker=markers[name], markersize=3
            )
            band = (mean - error, mean + error)
            panel.fill_between(after, *band, color=colour, alpha=0.2, linewidth=0)
            panel.set_xticks(after)
        panel.set_title(title)
        panel.set_xlabel("Tasks learned")
    axes[0, 0].set_ylabel("Average accuracy")
    axes[0, 0].set_ylim(0, 1.02)
    figure.suptitle(suptitle or "", fontsize=STYLE["font.size"])
    every = {
        name: [np.ravel(of[name]) for of in panels.values() if name in of]
        for name in names
    }
    figure.legend(
        [lines[name] for name in names],
        [labelled(name, np.concatenate(values)) for name, values in every.items()],
        loc="outside lower center",
        ncols=math.ceil(len(names) / math.ceil(len(names) / 7)),  # that fit in a row
        frameon=False,
    )
    return figure
