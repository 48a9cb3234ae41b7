#!/usr/bin/env bash
# JAX takes a convolution's patches with lax.Precision.HIGHEST, but not with "highest".
#
# Guess: jax.lax.conv_general_dilated_patches takes precision="highest" as conv_general_dilated
# does, which it calls and whose documentation it points to.
# Seen: it pairs the value with another one first, so that the string is refused (a ValueError that
# shows a pair which nobody gave); lax.Precision.HIGHEST and no precision at all work.
# Who meets it: whoever takes patches in float32 on an accelerator, for a K-FAC factor, say, where the
# default precision would round, and writes the precision as everywhere else.
# Versions: Python 3.11, jax 0.10.2.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/program.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

print("Python", sys.version.split()[0], "jax", jax.__version__)
image, kernel = jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1, 2, 2))


def tried(function, precision):
    try:
        return function(precision).shape
    except ValueError as error:
        return f"ValueError: {error}"


def convolved(precision):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", precision=precision)


def patches(precision):
    return jax.lax.conv_general_dilated_patches(
        image, (2, 2), (1, 1), "VALID", precision=precision
    )


seen = {
    (f.__name__, str(p)): tried(f, p)
    for f in (convolved, patches)
    for p in ("highest", jax.lax.Precision.HIGHEST, None)
}
for name, found in seen.items():
    print(*name, found, sep=": ")
print("guess: a shape six times; seen: the patches refuse the string")
refused = {name for name, found in seen.items() if isinstance(found, str)}
assert refused == {("patches", "highest")}, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/program.py"
