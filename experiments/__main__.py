"""List the experiments: ``python -m experiments``."""

import ast
from pathlib import Path

from experiments.engine.command import CONFIGS


def titles() -> dict[str, str]:
    """What each experiment is, by name: the first words of its module."""
    folder, descriptions = Path(__file__).parent, {}
    for name in sorted(path.stem for path in CONFIGS.glob("*.toml")):
        files = (folder / f"{name}.py", folder / name / "__main__.py")
        if path := next((x for x in files if x.exists()), None):
            words = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            descriptions[name] = words.partition(" ``")[0].removesuffix(":")
    return descriptions


if __name__ == "__main__":
    print("python -m experiments.NAME --help says what each takes:\n")
    for name, title in titles().items():
        print(f"  {name:<16} {title}")
