#!/usr/bin/env bash
# Optax's Prodigy and D-Adaptation are NaN for good where the warm-up begins at a rate of 0.
#
# One would guess: with the warm-up that optax's own schedules make, from 0 up to 1, the first step moves
# nothing and the next ones learn, as with AdamW; and so where the first gradient is zero.
# Seen: prodigy is NaN from its first step on, dadapt_adamw from its second. Their estimate of the
# distance is divided by the sum of what the steps so far have added, which is then 0: 0/0. The same
# where the rate is constant and every entry of the first gradient is zero. A later zero does no harm,
# nor does a warm-up that begins at 1e-3.
# Who meets it: whoever keeps a schedule when changing from AdamW, and whose first batch is all padding.
# Versions: Python 3.11, jax 0.10.2, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import math
import sys

import jax
import jax.numpy as jnp
import optax
from optax import contrib

print("Python", sys.version.split()[0], "jax", jax.__version__, "optax", optax.__version__)


def norms(tx, no_gradient_at=None, steps=30):
    """Of the parameters after every step down ‖θ‖²/2."""
    params = jnp.array([1.0, -2.0, 3.0])
    state = tx.init(params)
    found = []
    for step in range(steps):
        grads = jnp.zeros_like(params) if step == no_gradient_at else params
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(jnp.linalg.norm(params)))
    return found


from_zero = optax.linear_schedule(0.0, 1.0, 10)
from_little = optax.linear_schedule(1e-3, 1.0, 10)
makers = {"prodigy": contrib.prodigy, "dadapt_adamw": contrib.dadapt_adamw}
seen = {("adamw", "warm-up from 0"): norms(optax.adamw(from_zero))}
for name, make in makers.items():
    seen[name, "warm-up from 0"] = norms(make(learning_rate=from_zero))
    seen[name, "warm-up from 0.001"] = norms(make(learning_rate=from_little))
    seen[name, "first gradient zero"] = norms(make(learning_rate=1.0), 0)
    seen[name, "sixth gradient zero"] = norms(make(learning_rate=1.0), 5)
for (name, what), found in seen.items():
    print(f"{name}, {what}: {found[0]:.3f}, {found[1]:.3f}, …, {found[-1]:.3f}")
print("guess: all are numbers; seen: NaN after a first step of rate or gradient 0")

nan = {key for key, found in seen.items() if math.isnan(found[-1])}
expected = {(n, w) for n in makers for w in ("warm-up from 0", "first gradient zero")}
assert nan == expected, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
