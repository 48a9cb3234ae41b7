"""Images and texts, and the tasks made of them."""

from experiments.data.datasets import (
    DataError,
    Dataset,
    Examples,
    hold_out,
    join,
    select,
)
from experiments.data.images import Source, load

__all__ = [
    "DataError",
    "Dataset",
    "Examples",
    "Source",
    "hold_out",
    "join",
    "load",
    "select",
]
