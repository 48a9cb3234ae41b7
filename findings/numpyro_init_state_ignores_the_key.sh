#!/usr/bin/env bash
# NumPyro's SVI.run takes a random key and, given init_state, does not use it.
#
# One would guess: svi.run(random.key(1), n, data, init_state=state) and the same with
# random.key(2) go on with different noise, as they do without init_state. The docstring's own example
# of init_state passes a new key.
# Seen: the same losses to the last bit; the noise is that of the key inside the state.
# Who meets it: whoever goes on from a state with several keys, for error bars or another try, and
# gets the same run every time.
# Versions: Python 3.12, numpyro 0.22.0, jax 0.12.0.1.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpyro==0.22.0 jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8 numpy==2.5.5
cat > "$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

print("Python", sys.version.split()[0], "jax", jax.__version__, "numpyro", numpyro.__version__)


def model(y):
    w = numpyro.sample("w", distributions.Normal(0.0, 1.0))
    numpyro.sample("y", distributions.Normal(w, 1.0), obs=y)


svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO())
y = jnp.ones(5)


def losses(key, **options):
    return svi.run(jax.random.key(key), 5, y, progress_bar=False, **options).losses


state = svi.run(jax.random.key(0), 5, y, progress_bar=False).state
afresh = losses(1), losses(2)
onward = losses(1, init_state=state), losses(2, init_state=state)
print("afresh, keys 1 and 2:           ", *afresh)
print("from the same state, keys 1 and 2:", *onward)
print("guess: different both times; seen: from a state they are equal")
assert (afresh[0] != afresh[1]).any(), "the behaviour has changed"
assert (onward[0] == onward[1]).all(), "the behaviour has changed"
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore "$folder/program.py"
