"""Checkpoints of a run, by orbax: whole or absent, verified, the last two kept."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run in a folder of their own.

    Under ``jax.distributed`` every process calls the same methods, and all see the same
    folder; each writes and reads its own part of the arrays.

    Args:
      folder: made when the first checkpoint is written.
      keep: how many of the newest stay.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp
      >>> from si_jax.checkpoint import Checkpoints
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = Checkpoints(pathlib.Path(folder))
      ...     checkpoints.save(1, {"w": jnp.ones(2)})
      ...     step, tree = checkpoints.restore(like={"w": jnp.zeros(2)})
      >>> print(step, tree["w"])
      1 [1. 1.]
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder.absolute()
        self._keep = keep

    def save(self, step: int, tree: Any) -> None:
        """Write ``tree`` as the newest checkpoint; it appears whole or not at all.

        A disk that is full costs the checkpoint, not the run: it is logged, and the
        older checkpoints stay.

        Args:
          step: a number larger than those before.
          tree: arrays, sharded or not.
        """
        content = {"tree": tree, "checksum": np.asarray(_checksum(tree), np.uint32)}
        try:
            with self._manager() as manager:
                manager.save(step, args=ocp.args.StandardSave(content))
        except (OSError, ValueError) as error:
            _log.warning(
                "No checkpoint could be written to %s: %s. The run goes on; make room, "
                "or what comes from here on is lost if it is interrupted.",
                self._folder,
                str(error).splitlines()[0],
            )

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Read the newest checkpoint that is intact.

        One that is damaged is logged and put aside, and the one before it is read.

        Args:
          like: a tree of arrays or ``jax.ShapeDtypeStruct``, with the shardings wanted.

        Returns:
          Its step and tree, or ``None`` if there is none.
        """
        if not self._folder.exists():
            return None
        content = {"tree": like, "checksum": np.zeros((), np.uint32)}
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                wrong, tree = "", None
                try:
                    found = manager.restore(
                        step, args=ocp.args.StandardRestore(content)
                    )
                    tree = found["tree"]
                    if found["checksum"] != _checksum(tree):
                        wrong = "its checksum does not fit"
                except Exception as error:  # whatever the storage layers raise
                    wrong = str(error).splitlines()[0][:200]
                if not _anywhere(bool(wrong)):
                    return step, tree
                path = self._folder / str(step)
                _log.warning(
                    "The checkpoint %s is damaged (%s); going back to the one before.",
                    path,
                    wrong or "for another process",
                )
                if jax.process_index() == 0:
                    aside = self._folder.with_name(f"{self._folder.name}-damaged")
                    aside.mkdir(exist_ok=True)
                    shutil.move(path, aside / f"{step}-{time.time_ns()}")
        return None

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)


def _checksum(tree: Any) -> np.uint32:
    """The sum of every array's words: the storage does not notice a flipped bit."""
    sums = [int(_sum_of_words(x)) for x in jax.tree.leaves(tree)]
    return np.uint32(sum(sums) % 2**32)


@jax.jit
def _sum_of_words(x: jax.Array) -> jax.Array:
    if x.dtype != bool:
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, width)
    return jnp.sum(x, dtype=jnp.uint32)


def _anywhere(flag: bool) -> bool:
    """Whether it is so on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())
