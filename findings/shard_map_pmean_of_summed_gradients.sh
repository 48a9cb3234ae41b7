#!/usr/bin/env bash
# In jax.shard_map pmean of the gradient of replicated parameters is their sum over the devices.
#
# One would guess: jax.lax.pmean(jax.grad(loss)(w, part), "x") is the mean of the
# devices' gradients, in jax.shard_map as in jax.pmap.
# Seen: in jax.pmap and with check_vma=False it is. In jax.shard_map as it is by default the gradient
# of what every device has whole comes back summed over the devices already; pmean changes nothing,
# and the gradient is too large by their number, 4 times on 4 devices, without a word.
# Who meets it: whoever moves a data parallel step from pmap to shard_map. Adam divides the factor
# out, so the loss looks right; what depends on the gradient's size (clipping by norm, decay in the
# loss, SGD's rate, a logged norm) is off.
# Versions: Python 3.11, jax 0.10.2. Also seen with jax 0.8.1, and with 0.12.0.1 on Python 3.13.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

print("Python", sys.version.split()[0], "jax", jax.__version__)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
whole, part = PartitionSpec(), PartitionSpec("x")
w, data = jnp.ones(()), jnp.array([1.0, 2.0, 3.0, 6.0])  # the mean of their gradients is 3


def loss(w, x):
    return jnp.mean(w * x)


def mean_of_gradients(w, x):
    return jax.lax.pmean(jax.grad(loss)(w, x), "x")


def mapped(f, **kwargs):
    specs = {"in_specs": (whole, part), "out_specs": whole}
    return float(jax.shard_map(f, mesh=mesh, **specs, **kwargs)(w, data))


mean_of_losses = jax.grad(lambda w, x: jax.lax.pmean(loss(w, x), "x"))
seen = {
    "one device": float(jax.grad(loss)(w, data)),
    "pmap, pmean of the gradients": float(
        jax.pmap(mean_of_gradients, "x", in_axes=(None, 0))(w, data[:, None])[0]
    ),
    "shard_map with check_vma=False, pmean of the gradients": mapped(
        mean_of_gradients, check_vma=False
    ),
    "shard_map, pmean of the gradients": mapped(mean_of_gradients),
    "shard_map, gradient of the mean loss": mapped(mean_of_losses),
}
for name, value in seen.items():
    print(f"{name}: {value:g}")
print("guess: 3 everywhere; seen: 12 for shard_map's pmean of the gradients")
assert list(seen.values()) == [3.0, 3.0, 3.0, 12.0, 3.0], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
