#!/usr/bin/env bash
# Fracast's forecast depends on the unit: below a range of 1e-5 the series shrinks to noughts.
#
# One would guess: each context is brought to its own range, so that of k times a series the forecast is
# k times the forecast, as long as float32 can hold it.
# Seen: so it is down to a range of 1e-5, where the range is cut off. A sine of amplitude 1e-7 (an
# electric current in amperes, say) is forecast wrong by twice its amplitude, and nothing says so.
# Who meets it: whoever forecasts in SI units what is small in them. Multiply by a power of ten first.
# Versions: Python 3.11, fracast 0.1.0, torch 2.13.0.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
"$folder/venv/bin/pip" install --quiet fracast==0.1.0 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import torch
from fracast import FracastModel

version = importlib.metadata.version("fracast")
print("Python", sys.version.split()[0], "fracast", version, "torch", torch.__version__)

model = FracastModel.from_pretrained()
sine = np.sin(2 * np.pi * np.arange(600) / 24)
forecast = model.forecast(sine)


def error(amplitude):
    """The largest difference from the forecast of the sine itself, in amplitudes."""
    return np.abs(model.forecast(amplitude * sine) / amplitude - forecast).max()


for amplitude in (1e3, 1e-5, 1e-6, 1e-7):
    print(f"amplitude {amplitude:g}: off by {error(amplitude):.1e} of it")
print("guess: nothing but rounding")
assert max(error(1e3), error(1e-5)) < 1e-5, "the behaviour has changed"
assert error(1e-7) > 1, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/program.py"
