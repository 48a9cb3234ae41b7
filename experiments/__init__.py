"""The paper's experiments: ``python -m experiments`` lists them."""

import importlib.util
import sys

NEEDED = ("flax", "matplotlib", "orbax", "tqdm", "tyro")

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    message = (
        f'the experiments need {", ".join(missing)}: pip install -e ".[experiments]"'
    )
    if sys.argv[0] == "-m":  # so it is while python -m looks for a module
        sys.exit(f"error: {message}")
    raise ImportError(message)
