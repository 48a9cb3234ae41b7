#!/usr/bin/env bash
# Orbax restores an optax state into one with another mask: None for an array, or an array dropped.
#
# Guess, before it was first run: a state saved under optax.masked with one mask and restored into a
# target made with another is refused, since the structures of the two trees differ.
# Seen: it is not. Where the checkpoint was masked and the target is an array, the result is None in
# the array's place; where the checkpoint has an array and the target is masked, the array is left out.
# Who meets it: whoever freezes or thaws a part of a network between two runs. Momentum that was to be
# kept is gone; where None took an array's place, the error comes later and elsewhere, if at all.
# Versions: Python 3.11, orbax-checkpoint 0.12.8, jax 0.10.2, optax 0.2.8. Also seen with
# orbax-checkpoint 0.11.25, jax 0.8.1, optax 0.2.6.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 orbax-checkpoint==0.12.8 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

orbax = importlib.metadata.version("orbax-checkpoint")
print("Python", sys.version.split()[0], "jax", jax.__version__, "orbax-checkpoint", orbax)
path = pathlib.Path(sys.argv[1]).resolve()
params = {"body": jnp.ones(2), "head": jnp.ones(2)}


def state(**mask):
    tx = optax.masked(optax.trace(0.9), mask)
    return tx.update(params, tx.init(params))[1]  # the momentum is 1


narrow, wide = state(body=True, head=False), state(body=True, head=True)
for name, saved in (("narrow", narrow), ("wide", wide)):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / name, saved)
with ocp.StandardCheckpointer() as checkpointer:
    thawed = checkpointer.restore(path / "narrow", wide).inner_state.trace["head"]
with ocp.StandardCheckpointer() as checkpointer:
    frozen = checkpointer.restore(path / "wide", narrow).inner_state.trace["head"]
print("head masked in the checkpoint, an array in the target:", thawed)
print("head an array in the checkpoint, masked in the target:", frozen)
print("guess: both are refused; seen: None, and a node without the array")
assert thawed is None, "the behaviour has changed"
assert isinstance(frozen, optax.MaskedNode), "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py" "$folder"
