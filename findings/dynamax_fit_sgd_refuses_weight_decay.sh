#!/usr/bin/env bash
# Dynamax' fit_sgd takes "an optax optimizer", and most with weight decay fail in it.
#
# One would guess: fit_sgd(optimizer=optax.adamw(1e-3)) trains as with optax.adam.
# Seen: a ValueError of optax's from its first step: fit_sgd does not pass the parameters to
# optimizer.update. So do lion, lamb and adafactor, that is every optimizer that reads parameters.
# Who meets it: whoever asks for weight decay or another of these in a hidden Markov or linear
# Gaussian model.
# Versions: Python 3.12, dynamax 1.0.3, jax 0.12.0.1, optax 0.2.8.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dynamax==1.0.3 jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8 numpy==2.5.5
cat > "$folder/program.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import optax
from dynamax.hidden_markov_model import GaussianHMM

dynamax = importlib.metadata.version("dynamax")
print("Python", sys.version.split()[0], "jax", jax.__version__, "dynamax", dynamax)
model = GaussianHMM(2, 1)
params, props = model.initialize(jax.random.key(0))
data = jax.random.normal(jax.random.key(1), (20, 1))
seen = {}
for name in ("sgd", "adam", "adamw", "lion", "lamb", "adafactor"):
    optimizer = getattr(optax, name)(1e-3)
    try:
        model.fit_sgd(params, props, data, optimizer=optimizer, num_epochs=2)
        seen[name] = "trains"
    except ValueError as error:
        seen[name] = "ValueError"
        print(name, error)
print(seen)
print("guess: all train; seen: sgd and adam do")
trained = [name for name, result in seen.items() if result == "trains"]
assert trained == ["sgd", "adam"], "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
