#!/usr/bin/env bash
# Rejax' max_grad_norm bounds every entry of the gradient, not its norm.
#
# One would guess: PPO.create(max_grad_norm=0.5) scales a gradient whose global norm is
# above 0.5 down to it, as the parameter of that name does in PPO elsewhere.
# Seen: a gradient with norm 6.8 and entries of 0.1 passes as it is; only entries beyond 0.5 are cut.
# Who meets it: whoever takes the hyperparameters of another PPO: 0.5, the usual one, then clips
# almost nothing. Also of DQN, SAC and the others here that have the parameter.
# Versions: Python 3.12, rejax 0.1.3, jax 0.12.0.1, flax 0.12.12, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rejax==0.1.3 jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 optax==0.2.8 numpy==2.5.5
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import optax
from rejax import PPO

rejax = importlib.metadata.version("rejax")
print("Python", sys.version.split()[0], "jax", jax.__version__, "rejax", rejax)
ppo = PPO.create(env="CartPole-v1", max_grad_norm=0.5)
actor = ppo.init_state(jax.random.key(0)).actor_ts


def norm_of_what_adam_gets(entry):
    grads = jax.tree.map(lambda x: jnp.full_like(x, entry), actor.params)
    _, opt_state = actor.tx.update(grads, actor.opt_state, actor.params)
    first_moment = optax.tree.get(opt_state, "mu")  # 0.1 of the first gradient
    return optax.global_norm(grads), 10 * optax.global_norm(first_moment)


for entry in (0.1, 10.0):
    before, after = norm_of_what_adam_gets(entry)
    print(f"entries of {entry}: norm {before:.2f}, after max_grad_norm=0.5 {after:.2f}")
before, after = norm_of_what_adam_gets(0.1)
print("guess: 0.50 after it; seen: 6.79, as before")
assert jnp.allclose(before, after) and after > 6, "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
