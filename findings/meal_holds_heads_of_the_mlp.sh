#!/usr/bin/env bash
# MEAL's EWC, MAS and L2 hold the heads of its default network, which they are told not to.
#
# One would guess: with use_multihead=True, the default, regularize_heads is False, and the mask of
# the penalty is 0 for every task's output head, whatever the encoder.
# Seen: 0 for the CNN's actor_head, 1 for the MLP's actor_Dense_head, whose name has the layer's
# type inside. With L2 the outputs of tasks to come are pulled to their start.
# Who meets it: whoever compares the encoders, or takes the MLP's numbers for those of free heads.
# Versions: Python 3.12, MEAL at commit 057f862 (of 2026-08-13), meal-bench 0.3.1, jax 0.11.2,
# flax 0.12.12.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet meal-bench==0.3.1 jax==0.11.2 jaxlib==0.11.2 flax==0.12.12 numpy==2.5.5
git clone --quiet --filter=blob:none --sparse --no-checkout https://github.com/TTomilin/MEAL "$folder/MEAL"
git -C "$folder/MEAL" sparse-checkout set experiments
git -C "$folder/MEAL" checkout --quiet 057f86291096657f0353a882d6a3ee2209689261
cat > "$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from experiments.algos.ippo import IPPOConfig
from experiments.continual.ewc import EWC
from experiments.model import cnn, mlp
from experiments.utils import init_cl_state

print("Python", sys.version.split()[0], "jax", jax.__version__)
config = IPPOConfig(cl_method="ewc", seq_length=3)
assert config.use_multihead


def held(module, observation):
    network = module.ActorCritic(6, num_tasks=3, use_multihead=config.use_multihead)
    params = network.init(jax.random.key(0), observation)
    state = init_cl_state(
        params, config.regularize_critic, not config.use_multihead, EWC(), config
    )
    return {
        name: float(layer["kernel"].mean())
        for name, layer in state.mask["params"].items()
        if "actor" in name and "head" in name
    }


seen = held(cnn, jnp.zeros((1, 7, 7, 26))), held(mlp, jnp.zeros((1, 1274)))
print("mask of the policy's heads: CNN", seen[0], "MLP", seen[1])
print("guess: 0 for both; seen: 0, 1")
assert seen == ({"actor_head": 0}, {"actor_Dense_head": 1}), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu PYTHONPATH="$folder/MEAL" "$folder/venv/bin/python" -W ignore "$folder/program.py"
