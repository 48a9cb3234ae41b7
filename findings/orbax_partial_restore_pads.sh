#!/usr/bin/env bash
# Orbax's strict=False fills what a checkpoint lacks of an array with zeros, not with the target.
#
# One would guess: restored with strict=False into an array that is larger, the saved
# block is put into the target; the new entries keep the values that the target has.
# Seen: they are 0. Where the target is an initialised layer (a head with a new class), the new
# weights are not initialised any more, nor is a copy of them in an optimizer's state.
# Who meets it: whoever restores a smaller network into a larger one, and follows the advice of the
# error that Orbax raises otherwise (strict=False). Its docstring does say "padding", not with what.
# Versions: Python 3.11, orbax-checkpoint 0.12.8, jax 0.10.2. Also seen with 0.11.25 and jax 0.8.1.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

orbax = importlib.metadata.version("orbax-checkpoint")
print("Python", sys.version.split()[0], "jax", jax.__version__, "orbax-checkpoint", orbax)
path = pathlib.Path(sys.argv[1]).resolve() / "checkpoint"
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {"head": jnp.array([1.0, 2.0])})
target = {"head": jnp.array([7.0, 8.0, 9.0])}
with ocp.StandardCheckpointer() as checkpointer:
    head = checkpointer.restore(path, target, strict=False)["head"].tolist()
print("saved [1, 2], target [7, 8, 9], restored", head)
print("guess: [1, 2, 9]; seen: [1, 2, 0]")
assert head == [1.0, 2.0, 0.0], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder"
