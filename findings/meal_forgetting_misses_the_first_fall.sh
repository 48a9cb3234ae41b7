#!/usr/bin/env bash
# MEAL's forgetting is 0 if a task is lost before the first evaluation of the next.
#
# One would guess: a task that scores 1 to the end of its training and 0 ever after has the
# forgetting 1, as the docstring says ("1 means performance drops to 0 right after training").
# Seen: 0. The index taken for the end of its training is that of the first evaluation during the
# next task (20 of 40, counted from 0), so what is lost by then is not counted, and a task lost
# whole is skipped. With the index before it, the last of its own training, the measure is 1.
# Who meets it: whoever compares methods by the F of results_table.py, whose default it is: a method
# that forgets at once looks better than one that forgets half of it later.
# Versions: Python 3.12, numpy 2.5.5, MEAL at commit 057f862 (of 2026-08-13).
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.5.5
git clone --quiet --filter=blob:none --no-checkout https://github.com/TTomilin/MEAL "$folder/MEAL"
git -C "$folder/MEAL" checkout --quiet 057f86291096657f0353a882d6a3ee2209689261 -- experiments/results/plotting/utils/metrics.py
cat > "$folder/program.py" <<'PYTHON'
import sys

import numpy as np
from metrics import compute_forgetting, training_end_idx_for_task

print("Python", sys.version.split()[0], "numpy", np.__version__)


def forgetting(curve, end=None):
    if end is None:
        end = training_end_idx_for_task(0, len(curve), n_train=len(curve), seq_len=2)
    return compute_forgetting(curve, "weighted", training_end_idx=end)


# 20 evaluations while the first of two tasks is trained, 20 while the second is.
at_once = np.repeat([1.0, 0.0], 20)
late = np.repeat([1.0, 0.5], [30, 10])
print("lost at once:", forgetting(at_once), "half lost, later:", forgetting(late))
print("lost at once, from its own last evaluation:", forgetting(at_once, end=19))
print("guess: 1.0 for the first; seen: 0.0")
assert forgetting(at_once) == 0 < forgetting(late), "the behaviour has changed"
assert forgetting(at_once, end=19) == 1, "the behaviour has changed"
PYTHON
PYTHONPATH="$folder/MEAL/experiments/results/plotting/utils" "$folder/venv/bin/python" -W ignore "$folder/program.py"
