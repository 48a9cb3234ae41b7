#!/usr/bin/env bash
# Kauldron's num_train_steps=10 makes eleven steps.
#
# One would guess: "num_train_steps: Number of training steps" is the number of updates.
# Seen: one more: state.step and Adam's count are 11, the parameters have moved eleven times.
# Who meets it: whoever compares with a loop of one's own, counts examples or epochs, or trains in
# stages, where every stage has a step too many.
# Versions: Python 3.12, kauldron 1.4.4, jax 0.12.0.1, flax 0.12.12, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv # pip takes minutes to choose among the versions
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv" kauldron==1.4.4 jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 optax==0.2.8 numpy==2.5.5
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import sys
import tempfile

import jax
import numpy as np
import optax
from flax import linen as nn
from kauldron import kd

kauldron = importlib.metadata.version("kauldron")
print("Python", sys.version.split()[0], "jax", jax.__version__, "kauldron", kauldron)


class Model(nn.Module):
    x: kd.kontext.Key = "batch.x"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


examples = {"x": np.ones((4, 3), np.float32), "y": np.ones((4, 1), np.float32)}
trainer = kd.train.Trainer(
    train_ds=kd.data.InMemoryPipeline(
        loader=lambda: examples, batch_size=4, shuffle=False
    ),
    model=Model(),
    train_losses={"loss": kd.losses.L2(preds="preds", targets="batch.y")},
    optimizer=optax.adam(0.1),
    num_train_steps=10,
    workdir=tempfile.mkdtemp(),
)
state, _ = trainer.train()
seen = int(state.step), int(optax.tree.get(state.opt_state, "count"))
print("num_train_steps 10: state.step, Adam's count =", seen)
print("guess: 10, 10; seen: 11, 11")
assert seen == (11, 11), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
