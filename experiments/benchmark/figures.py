"""Times by those of others."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from experiments.figures.style import styled


@styled
def ratios(groups: Mapping[str, Mapping[str, float]], *, label: str) -> Figure:
    """Horizontal bars, each with its number, a panel a group; a line at 1.

    Args:
      groups: for each group, a number a bar.
      label: what the numbers are.

    Returns:
      The figure.

    Example:
      >>> from experiments.benchmark import figures
      >>> figure = figures.ratios({"net": {"adam": 1.0, "si": 1.1}}, label="time")
      >>> print([text.get_text() for text in figure.axes[0].texts])
      ['1.00', '1.10']
    """
    counts = [len(bars) for bars in groups.values()]
    size = (5.5, 0.22 * sum(counts) + 0.4 * len(counts) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(counts), 1, sharex=True, squeeze=False, height_ratios=counts
    )[:, 0]
    for panel, (title, bars) in zip(panels, groups.items(), strict=True):
        container = panel.barh(range(len(bars)), list(bars.values()))
        panel.bar_label(container, fmt="%.2f", padding=2)
        panel.set_yticks(range(len(bars)), list(bars))
        panel.invert_yaxis()
        panel.axvline(1, color="0.3", linestyle=":", linewidth=1, zorder=0)
        panel.set_title(title, loc="left")
    panels[-1].margins(x=0.1)
    panels[-1].set_xlabel(label)
    return figure
