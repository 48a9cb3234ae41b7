"""What was found: summary, table, figure."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmark import figures, steps
from experiments.engine.tables import aligned
from experiments.engine.timing import medians


def summarize(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Each method's times and facts, and what follows from them."""
    summary = medians(measures["milliseconds"])
    known = steps.methods()  # without factors, which have bytes of their own to move
    for name, entry in summary.items():
        entry |= measures["facts"][name]
        if "batch_size" in measures:
            entry["examples_per_s"] = round(
                measures["batch_size"] / entry["ms"] * 1e3, 1
            )
        if "copy" in measures and name in known:
            moved = known[name].moved * measures["parameters"]
            entry["of_copy_bandwidth"] = round(
                moved / (entry["ms"] * 1e-3) / measures["copy"], 3
            )
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """A row a method of what was timed.

    "B/param" are bytes accessed, "copies" those of all parameters in a step, both as
    compiled; "of copy" is the bandwidth by the bytes that must move, over
    that of a copy.
    """
    kinds = {
        "ms": ("ms", 1, ".3f"),
        "× plain": ("to_plain", 1, ".2f"),
        "× wrapper": ("to_wrapper", 1, ".2f"),
        "B/param": ("accessed", 1, ".0f"),
        "copies": ("copies", 1, ".0f"),
        "images/s": ("examples_per_s", 1, ".0f"),
        "of copy": ("of_copy_bandwidth", 1, ".2f"),
        "compile s": ("compile_s", 1, ".1f"),
        "peak MB": ("peak_bytes", 1e-6, ".0f"),
        "state MB": ("state_bytes", 1e-6, ".1f"),
    }
    rows = [["", *kinds]]
    for what, methods in summary.items():
        for name, x in methods.items():
            cells = [
                f"{x[key] * unit:{form}}" if key in x else ""
                for key, unit, form in kinds.values()
            ]
            rows.append([f"{what}, {name}", *cells])
    return aligned(rows)


def figure(summary: Mapping[str, Any]) -> Figure:
    """Each method's time by that of the wrapper."""
    return figures.ratios(
        {
            what: {name: x["to_wrapper"] for name, x in methods.items()}
            for what, methods in summary.items()
            if "adam" in methods
        },
        label="time by that of Adam with the wrapper",
    )
