"""The paper's experiments: ``python -m experiments`` lists them."""

import importlib.util
import sys

NEEDED = ("flax", "matplotlib", "orbax", "tqdm", "tyro")

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"error: the experiments need {', '.join(missing)}: "
        'pip install -e ".[experiments]"'
    )
