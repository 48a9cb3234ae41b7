#!/usr/bin/env bash
# safetensors saves a matrix in Fortran's order with its entries mixed up.
#
# Guess: save_file of np.asfortranarray(m) is read back as m, or saving it is refused. (The
# docstring asks for contiguous tensors; such a matrix is contiguous, in its own order.)
# Seen: 0.8.0 writes the bytes as they lie and the shape as it is, without a word: [[0, 1, 2],
# [3, 4, 5]] comes back as [[0, 3, 1], [4, 2, 5]]. 0.5.0 brings it back as it was.
# Who meets it: whoever saves kernels that a transpose, SciPy, LAPACK or a reader of columns made.
# np.ascontiguousarray first, and it is right.
# Versions: Python 3.11, safetensors 0.5.0 and 0.8.0, numpy 2.4.6.
# Exits with an error if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/program.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

matrix = np.arange(6.0).reshape(2, 3)
found = {
    name: load(save({"w": change(matrix)}))["w"].tolist()
    for name, change in (("C", np.ascontiguousarray), ("Fortran", np.asfortranarray))
}
print("Python", sys.version.split()[0], "safetensors", version("safetensors"), found)
mixed = [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
wanted = matrix.tolist() if version("safetensors") == "0.5.0" else mixed
print("guess: the same twice; seen: in 0.8.0 the second has its entries mixed up")
assert found == {"C": matrix.tolist(), "Fortran": wanted}, "the behaviour has changed"
PYTHON
for version in 0.5.0 0.8.0; do
    "${PYTHON:-python3.11}" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet safetensors==$version numpy==2.4.6
    "$folder/$version/bin/python" "$folder/program.py"
done
