"""A record as JSON: six digits, a line a row, ``null`` for what is no number."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np


def readable(content: dict[str, Any]) -> str:
    """Indented JSON, with a line for each row of numbers instead of each number."""
    text = json.dumps(nulls(content), indent=1, allow_nan=False)
    words, row = r'"(?:[^"\\]|\\.)*"', r'\[\s*([^\[\]{}"]*?)\s*\]'

    def shorter(match: re.Match[str]) -> str:
        return match[0] if match[1] is None else f"[{' '.join(match[1].split())}]"

    return re.sub(f"{words}|{row}", shorter, text) + "\n"


def plain(value: Any) -> Any:
    """Paths as text, tuples as lists, arrays as lists of numbers of six digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.tolist()
        return _plain_floats(array.astype(np.float64).tolist())
    if isinstance(value, Path):
        return str(value)
    return value


def _plain_floats(values: Any) -> Any:
    """Numbers of six digits, however deep in lists."""
    return [*map(_plain_floats, values)] if isinstance(values, list) else digits(values)


def digits(value: Any) -> float:
    """Six of them, wherever the point is."""
    return float(f"{value:.6g}")


def nulls(value: Any) -> Any:
    """``None`` for what is no finite number: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: nulls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value: Any) -> Any:
    """NaN for ``None`` in lists, as it was before it was written."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if x is None else numbers(x) for x in value]
    return value
