"""Images and texts, and the tasks made of them."""

from experiments.data.images import (
    DataError,
    Dataset,
    Examples,
    Source,
    hold_out,
    join,
    load,
    select,
)

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
