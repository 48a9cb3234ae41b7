#!/usr/bin/env bash
# A state assigned to an nnx.Optimizer is not the one that nnx.cached_partial trains with.
#
# One would guess: after `optimizer.opt_state = other` the next call of a step that
# was made by nnx.cached_partial(step, model, optimizer) uses `other`, as nnx.jit(step) does.
# Seen: nnx.jit uses it; cached_partial goes on with the variables it was given, and nothing says so.
# `nnx.update(optimizer.opt_state, nnx.state(other))`, in place, is seen by both.
# Who meets it: whoever changes an optimizer's state between calls (resets moments, restores a
# checkpoint, closes a task) by assignment, and caches the step for speed.
# Versions: Python 3.11, jax 0.10.2, flax 0.12.8, optax 0.2.8. Also seen with jax 0.8.1, flax 0.12.0
# and with jax 0.12.0.1, flax 0.12.12 on Python 3.13.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import sys

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.zeros(()))


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda m: m.w[...])(model))  # the gradient is 1


def assigned(optimizer, state):
    optimizer.opt_state = state


def in_place(optimizer, state):
    nnx.update(optimizer.opt_state, nnx.state(state))


def weight(bind, put):
    """One step with momentum, the momentum set to 100, another step."""
    model = Model()
    tx = optax.sgd(1.0, momentum=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    bound = bind(step, model, optimizer)
    bound()
    hundred = jax.tree.map(lambda x: jnp.full_like(x, 100.0), optimizer.opt_state)
    put(optimizer, hundred)
    bound()
    return float(model.w[...])


def plain(step, model, optimizer):
    return lambda: step(model, optimizer)


seen = {
    "jit, assigned": weight(plain, assigned),
    "jit, in place": weight(plain, in_place),
    "cached, assigned": weight(nnx.cached_partial, assigned),
    "cached, in place": weight(nnx.cached_partial, in_place),
}
for name, value in seen.items():
    print(f"{name}: w = {value:g}")
print("guess: -102 four times; seen: -3, the old momentum, where it is cached and assigned")
assert list(seen.values()) == [-102.0, -102.0, -3.0, -102.0], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
