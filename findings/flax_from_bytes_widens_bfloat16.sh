#!/usr/bin/env bash
# An optimizer state that Flax restored from bytes gives float32 updates of bfloat16 parameters.
#
# One would guess: flax.serialization.from_bytes(tx.init(params), to_bytes(state))
# is as good as `state`: the next tx.update gives the same updates.
# Seen: the leaves have the right dtype, bfloat16, but are NumPy's, whose arithmetic with Python
# numbers does not stay in bfloat16; outside of jit Adam's update is float32 and another number.
# jax.tree.map(jnp.asarray, restored) first, or jit, and it is the same.
# Who meets it: whoever goes on with bfloat16 parameters from a msgpack checkpoint without jit, or
# compares the first step after it with the one that was not interrupted.
# Versions: Python 3.11, jax 0.10.2, flax 0.12.8, optax 0.2.8, numpy 2.4.6.
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
from flax import serialization

print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)
tx = optax.adam(1e-3)
params = grads = jnp.ones(1, jnp.bfloat16)
_, state = tx.update(grads, tx.init(params))
restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
print("dtypes in the state:", [str(x.dtype) for x in jax.tree.leaves(restored)])
seen = {
    "not interrupted": tx.update(grads, state)[0],
    "restored": tx.update(grads, restored)[0],
    "restored, jnp.asarray": tx.update(grads, jax.tree.map(jnp.asarray, restored))[0],
    "restored, under jit": jax.jit(tx.update)(grads, restored)[0],
}
for name, update in seen.items():
    print(f"{name}: {float(update[0]):.9f} {update.dtype}")
print("guess: the same four times; seen: the second is float32, and another number")
whole, second, third, fourth = seen.values()
assert second.dtype == jnp.float32, "the behaviour has changed"
assert second[0] != whole[0].astype(jnp.float32), "the behaviour has changed"
for update in (third, fourth):
    assert update.dtype == whole.dtype == jnp.bfloat16, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
