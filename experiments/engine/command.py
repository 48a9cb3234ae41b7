"""What the experiments' command lines share: configurations and users' mistakes."""

import argparse
import dataclasses
import difflib
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import jax
import numpy as np
import tyro

from experiments.data.datasets import DataError

CONFIGS = Path(__file__).parents[2] / "configs"

Config = TypeVar("Config", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """What every experiment takes and no result depends on."""

    out: Path | None = None
    """Folder for the results, by default in runs/. The same command again goes on."""
    overwrite: bool = False
    """Throw away the results that --out holds."""
    data_dir: Path | None = None
    """TFDS's folder, or that of MNIST/raw or mnist.npz; by default $TFDS_DATA_DIR, else
    ~/tensorflow_datasets."""
    checkpoint_every: int = 5
    """Epochs between checkpoints; there is one at every task's end, too."""
    max_parallel: int | None = None
    """Runs side by side on a device; by default 64 on an accelerator, 1 on a CPU."""
    tensorboard: bool = False
    """Write losses and accuracies for TensorBoard, too, into --out."""
    coordinator: str | None = None
    """Of several processes, each started with this command: HOST:PORT of the first."""
    num_processes: int | None = None
    """How many processes there are; those of srun are found without these three."""
    process_id: int | None = None
    """This one's number, from 0."""

    PICKS: ClassVar[tuple[str, ...]] = ()
    """Settings that choose what to run, named in the results, and change none."""

    def check(
        self,
        *,
        positive: tuple[str, ...] = (),
        at_least_0: tuple[str, ...] = (),
        at_least_1: tuple[str, ...] = (),
        shares: tuple[str, ...] = (),
        strengths: tuple[str, ...] = (),
        named: tuple[str, ...] = (),
    ) -> None:
        """Refuse values that make no sense, for ``__post_init__``.

        Args:
          positive: settings that are numbers above 0.
          at_least_0: numbers of something, or none of it.
          at_least_1: numbers of something.
          shares: numbers from 0 up to, but not, 1.
          strengths: tuples of numbers from 0 on, a method each.
          named: tuples of names, one at least.
        """
        for least, names in (
            (0, at_least_0),
            (1, (*at_least_1, "checkpoint_every", "max_parallel")),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in positive:
            if not 0 < np.float32(getattr(self, name)) < np.inf:  # as it is used
                raise ValueError(
                    f"{name} must be > 0 and finite, got {getattr(self, name)}"
                )
        for name in shares:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in strengths:
            values = getattr(self, name)
            if not all(0 <= value < np.inf for value in values):
                raise ValueError(f"{name} must be >= 0 and finite, got {values}")
            if len({f"{c:g}" for c in values}) < max(len(values), 1):
                raise ValueError(f"{name} must be one or more, and differ: {values}")
        for name in named:
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        batch_size = getattr(self, "batch_size", 0)
        parts = getattr(self, "micro_batch", 0)
        if parts and batch_size % parts:
            raise ValueError(
                f"micro_batch must divide batch_size: {parts}, {batch_size}"
            )


class UserError(Exception):
    """A mistake that one clear message mends."""


def main(config_class: type[Config], name: str, run: Callable[[Config], None]) -> None:
    """Parse the command line and run; a user's mistake ends in a message, no trace."""
    try:
        config = parse(config_class, name, sys.argv[1:])
        # On a CPU every core is a device, so that runs go side by side.
        jax.config.update("jax_num_cpu_devices", _cores())
        _join(config)
        _in_float32()
        _keep_compiled()
        run(config)
        sys.stdout.flush()
    except (UserError, DataError) as error:
        _end(f"error: {error}")
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on from the last checkpoint")
    except BrokenPipeError:
        # Or Python would say so itself when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end("stopped: nobody reads the output; the same command goes on from there")
    except ConnectionError as error:
        _end(
            f"error: another process is gone ({error}).\nStart all of them again with "
            "the same command: they go on from the last checkpoint."
        )


def _join(options: Options) -> None:
    """Join the other processes, if there are any."""
    processes = (options.coordinator, options.num_processes, options.process_id)
    if any(value is not None for value in processes):
        if None in processes:
            raise UserError(
                "--coordinator, --num-processes and --process-id go together."
            )
        try:
            jax.distributed.initialize(*processes, initialization_timeout=60)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot join the coordinator {options.coordinator}: {error}"
            ) from error
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun's; not salloc's
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot join SLURM's other tasks: {error}\nStart all with one "
                "srun, or give --coordinator, --num-processes and --process-id."
            ) from error


def _in_float32() -> None:
    """Multiply float32 in float32; accelerators round the factors by default."""
    if "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ:
        jax.config.update("jax_default_matmul_precision", "highest")


def _keep_compiled() -> None:
    """Let accelerators' programs be compiled once, not at every start.

    On a CPU they take seconds, and jaxlib refuses those it kept itself on many Intel
    ones, with an error message each (jax issue 38445).
    """
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if jax.default_backend() != "cpu" and not chosen:
        caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(caches / "si_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _end(message: str) -> NoReturn:
    """Say why, and leave with status 1."""
    if jax.process_count() == 1:
        sys.exit(message)
    # An orderly exit would wait for processes that may be gone.
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def parse(config_class: type[Config], name: str, arguments: list[str]) -> Config:
    """The configuration in ``--config FILE``, and what the command line overrides.

    Args:
      config_class: a frozen dataclass; its ``__post_init__`` raises ``ValueError`` for
        values that make no sense.
      name: the experiment's; ``configs/NAME.toml`` is the file without ``--config``.
      arguments: the command line.

    Raises:
      UserError: if the file cannot be read or has an unknown key. A value of the
        wrong type or that makes no sense, or an unknown flag, ends the program with
        tyro's message and status 2.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config", type=Path, default=CONFIGS / f"{name}.toml")
    known, overrides = flags.parse_known_args(arguments)
    path = known.config
    try:
        entries = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {path}: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise UserError(f"the configuration {path} is not TOML: {error}") from error
    fields = [field.name for field in dataclasses.fields(config_class)]
    for key in entries:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(fields)}"
            )
            raise UserError(f"{path}: unknown key {key!r}; {hint}")
    description = (
        f"{config_class.__doc__}\n\nDefaults come from --config FILE, here {path}."
    )
    words = [word for key, value in entries.items() for word in _flag(key, value)]
    prog = f"python -m experiments.{name}"
    # The file by itself first, so that a mistake in it is not taken for a flag's.
    try:
        base = tyro.cli(config_class, args=words, prog=prog)
    except SystemExit:
        print(f"(in {path})", file=sys.stderr)
        raise
    return tyro.cli(
        config_class, args=overrides, default=base, description=description, prog=prog
    )


def _flag(key: str, value: Any) -> list[str]:
    """An entry of the file as tyro's words, so that one parser checks both."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
