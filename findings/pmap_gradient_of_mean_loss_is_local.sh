#!/usr/bin/env bash
# In jax.pmap the gradient of the mean loss is each device's own, not the mean.
#
# One would guess: the loss averaged by jax.lax.pmean inside the function that
# jax.grad differentiates has the gradient of the average, in jax.pmap and in jax.shard_map.
# Seen: in jax.shard_map as it is by default, yes. In jax.pmap, and with check_vma=False, every device
# gets the gradient of its own part of the batch, without a word: replicas drift apart.
# Who meets it: whoever takes the way that is right in jax.shard_map (the mean in the loss) back to
# pmap, or switches check_vma off. The mean of the loss and of the gradient is right in all three.
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


def mean_loss(w, x):
    return jax.lax.pmean(jnp.mean(w * x), "x")


gradient = jax.grad(mean_loss)


def both(w, x):
    return jax.lax.pmean(gradient(w, x), "x")


def pmapped(f):
    return jax.pmap(f, "x", in_axes=(None, 0))(w, data[:, None]).tolist()


def mapped(f, **kwargs):
    on_each = jax.shard_map(
        lambda w, x: f(w, x)[None], mesh=mesh, in_specs=(whole, part), out_specs=part, **kwargs
    )
    return on_each(w, data).tolist()


seen = {
    "shard_map": mapped(gradient),
    "shard_map with check_vma=False": mapped(gradient, check_vma=False),
    "pmap": pmapped(gradient),
    "shard_map, pmean of it": mapped(both),
    "shard_map with check_vma=False, pmean of it": mapped(both, check_vma=False),
    "pmap, pmean of it": pmapped(both),
}
for name, value in seen.items():
    print(f"{name}: {value}")
print("guess: 3 on every device; seen: 1, 2, 3, 6 in pmap and with check_vma=False")
mean, own = [3.0] * 4, data.tolist()
assert list(seen.values()) == [mean, own, own, mean, mean, mean], "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
