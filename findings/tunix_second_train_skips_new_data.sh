#!/usr/bin/env bash
# Tunix' PeftTrainer.train skips the data of a second call, and says nothing.
#
# One would guess: trainer.train(first) and then trainer.train(second) train on the one
# and then on the other, as `train_ds` is what to train on.
# Seen: of a later call's data it skips as many batches as it has trained on before. Of a second data
# set as long as the first it trains on none, and returns as if it had; of a longer one, on the rest.
# The skipping is meant for a restart from a checkpoint; here nothing was restored. (A public attribute
# that no documentation names, is_managed_externally = True, ends it, and the last checkpoint, too.)
# Who meets it: whoever trains in stages with one trainer: a curriculum, a second task, another epoch.
# Versions: Python 3.12, google-tunix 0.1.7, jax 0.12.0.1, flax 0.12.12, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet google-tunix==0.1.7 jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 optax==0.2.8 numpy==2.5.5
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

tunix = importlib.metadata.version("google-tunix")
print("Python", sys.version.split()[0], "jax", jax.__version__, "google-tunix", tunix)


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.zeros(()))

    def __call__(self, x):
        return x * self.w[...]


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


model = Model()
config = TrainingConfig(eval_every_n_steps=1000)
trainer = PeftTrainer(model, optax.sgd(0.1), config).with_loss_fn(loss)
seen = []
for target, length in ((1.0, 50), (3.0, 50), (3.0, 100)):
    trainer.train([{"x": jnp.ones(1), "y": jnp.full(1, target)}] * length)
    seen.append((round(float(model.w[...]), 2), trainer.train_steps))
    print(f"after {length} batches that ask for w = {target}: w, steps =", seen[-1])
print("guess: w = 1, 3, 3 after 50, 100, 200 steps; seen: 1, 1, 3 after 50, 50, 100")
assert seen == [(1.0, 50), (1.0, 50), (3.0, 100)], "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
