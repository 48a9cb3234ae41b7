"""What all figures share: style, colours, and how what diverged is named."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import ArrayLike

from si_jax import metrics

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # editable text
    "savefig.dpi": 200,
}
styled = matplotlib.rc_context(STYLE)  # decorates what draws

COLOURS = [f"C{i}" for i in range(10)]  # of Matplotlib's cycle


METHODS = (  # in the order of their colours
    "si",
    "fine-tuning",
    "ewc",
    "sgd",
    "sgd+dropout",
    "mas",
    "l2",
    "from scratch",
    "online ewc",
    "kronecker",
)


def colours_of(
    names: Iterable[str], methods: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Of runs, the same in every figure of accuracy.

    Args:
      names: the runs.
      methods: whose run each is, if it is not called like it; all of one method are
        shades of one colour.
    """
    strengths: dict[str, list[str]] = {}
    for name in names:
        strengths.setdefault((methods or {}).get(name, name), []).append(name)
    known = dict(zip(METHODS, COLOURS, strict=False))
    rest = itertools.cycle(x for x in COLOURS if x not in map(known.get, strengths))
    colours = {}
    for method, of in strengths.items():
        colour = np.asarray(to_rgb(known.get(method) or next(rest)))
        for i, name in enumerate(of):
            # From the pure colour towards white, never all the way.
            colours[name] = tuple(colour + (1 - colour) * 0.7 * i / len(of))
    return colours


def error_of(curve: np.ndarray) -> np.ndarray:
    """Over the first axis; 0, which draws nothing, where one seed has no spread."""
    return np.nan_to_num(np.asarray(metrics.standard_error(curve)))


def finite_of(values: ArrayLike) -> list[float]:
    """What can be drawn of some numbers."""
    values = np.asarray(values)
    return values[np.isfinite(values)].tolist()


def labelled(name: str, values: np.ndarray) -> str:
    """For the legend: what diverged (NaN) is not drawn, and its name says so."""
    return name if np.isfinite(values).all() else f"{name} (diverged)"
