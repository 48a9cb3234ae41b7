#!/usr/bin/env bash
# What a Tunix hook changes at on_train_end is in the last checkpoint, or not, by divisibility.
#
# One would guess: on_train_end runs before the trainer closes, which saves the last
# checkpoint; so the checkpoint holds what the hook made of model and optimizer.
# Seen: only if the number of steps is not a multiple of the interval of checkpoints. If it is, the
# last step was saved before the hook, no other checkpoint is written, and the change is lost.
# Who meets it: whoever ends training in a hook: averaged or merged weights, a memory that is closed,
# a counter that is reset; it works in a try of 90 steps and not in the run of 100.
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
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

tunix = importlib.metadata.version("google-tunix")
print("Python", sys.version.split()[0], "jax", jax.__version__, "google-tunix", tunix)


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.zeros(()))

    def __call__(self, x):
        return x * self.w[...]


class Seven(TrainingHooks):
    def on_train_end(self, trainer):
        trainer.model.w[...] = jnp.asarray(7.0)

    def nothing(self, *_, **__):
        pass

    on_train_start = on_train_step_start = on_train_step_end = nothing
    on_eval_step_start = on_eval_step_end = nothing


def loss(model, x):
    return jnp.mean((model(x) - 1.0) ** 2)


def restored(steps):
    config = TrainingConfig(
        eval_every_n_steps=1000,
        checkpoint_root_directory=tempfile.mkdtemp(),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=50),
    )
    trainer = PeftTrainer(Model(), optax.sgd(0.1), config).with_loss_fn(loss)
    trainer.with_training_hooks(Seven())
    trainer.train([{"x": jnp.ones(1)}] * steps)
    model = Model()
    assert PeftTrainer(model, optax.sgd(0.1), config).train_steps == steps
    return round(float(model.w[...]), 2)


seen = {steps: restored(steps) for steps in (90, 100)}
for steps, w in seen.items():
    print(f"{steps} steps, a checkpoint every 50, the hook sets w = 7: restored w = {w}")
print("guess: 7 both times; seen: 7 and 1")
assert seen == {90: 7.0, 100: 1.0}, "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
