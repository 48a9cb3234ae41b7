"""What a number depends on besides its configuration."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("si_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, Any]:
    """What a number depends on besides its configuration."""
    git = shutil.which("git")
    commit = (
        git
        and subprocess.run(
            [git, "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    device = jax.devices()[0]
    stack = {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit or None,
        "device": f"{device.platform}: {device.device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if device.platform != "cpu":  # a CPU multiplies in float32 anyway
        config: Any = jax.config  # not every version's types name the option
        stack["matmul_precision"] = config.jax_default_matmul_precision
    return stack
