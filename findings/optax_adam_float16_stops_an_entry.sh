#!/usr/bin/env bash
# One large gradient stops optax's Adam on a float16 parameter for good.
#
# One would guess: after one gradient of 300 Adam's average of squares falls again by b2 a step; some
# thousand steps later that entry moves as its neighbours do. 300 is far from float16's largest, 65,504.
# Seen: 300² is not: (1 − b2) g² is computed in float16 and infinite before it is scaled down, and an
# average that is infinite stays so. The entry's update is 0 at every later step, nothing is NaN, and
# nothing says so. optax.adam(mu_dtype=jnp.float32) changes the first moment alone, and nothing here.
# Who meets it: whoever trains float16 parameters without a float32 copy; the limit is a gradient of 256.
# Versions: Python 3.11, jax 0.10.2, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax

print("Python", sys.version.split()[0], "jax", jax.__version__, "optax", optax.__version__)


def last_update(dtype, mu_dtype=None):
    """Of two entries after 10,000 steps; the first began with a gradient of 300."""
    tx = optax.adam(1e-3, mu_dtype=mu_dtype)
    params = jnp.zeros(2, dtype)
    _, state = tx.update(jnp.array([300.0, 0.1], dtype), tx.init(params), params)

    def step(state, _):
        update, state = tx.update(jnp.array([0.1, 0.1], dtype), state, params)
        return state, update

    _, updates = jax.jit(lambda s: jax.lax.scan(step, s, length=10_000))(state)
    return updates[-1].tolist()


seen = {
    "float32": last_update(jnp.float32),
    "float16": last_update(jnp.float16),
    "float16, mu_dtype=float32": last_update(jnp.float16, jnp.float32),
}
for name, (first, second) in seen.items():
    print(f"{name}: {first:.2e} {second:.2e}")
print("guess: both move everywhere; seen: in float16 the first stands still for ever")
assert all(x[1] < -5e-4 for x in seen.values()), "the behaviour has changed"
assert [x[0] == 0 for x in seen.values()] == [False, True, True], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
