#!/usr/bin/env bash
# Orbax saves a NumPy scalar in a tree and refuses the same tree as the target of its restore.
#
# One would guess: a tree that StandardSave takes, StandardRestore takes as its target, too: it is the
# way that the documentation shows, restore(step, args=StandardRestore(tree)).
# Seen: np.float32(3.0) beside arrays is saved without a word; the restore raises. np.array(3.0,
# np.float32), which compares, prints and computes alike, comes back.
# Who meets it: whoever keeps a best loss, a temperature or a running mean, which NumPy's reductions
# return as scalars, in the training state. It shows when the run is to go on, not when it is saved.
# Versions: Python 3.11, orbax-checkpoint 0.12.8, jax 0.10.2, numpy 2.4.6.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

print("Python", sys.version.split()[0], "jax", jax.__version__, "orbax", ocp.__version__)


def round_trip(loss):
    tree = {"w": np.ones(2, np.float32), "best_loss": loss}
    with tempfile.TemporaryDirectory() as folder:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(pathlib.Path(folder) / "c", options=options) as manager:
            saved = manager.save(1, args=ocp.args.StandardSave(tree))
            try:
                manager.restore(1, args=ocp.args.StandardRestore(tree))
            except Exception as error:
                return saved, type(error).__name__
    return saved, "restored"


scalar = round_trip(np.float32(3.0))
array = round_trip(np.array(3.0, np.float32))
print("np.float32(3.0): saved", scalar[0], "then", scalar[1])
print("np.array(3.0, np.float32): saved", array[0], "then", array[1])
print("guess: both are restored")
assert array == (True, "restored"), "the behaviour has changed"
assert scalar[0] and scalar[1] != "restored", "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py" 2>&1 | grep -v WARNING
