"""Checkpoints of a run, by orbax: whole or absent, verified, the last two kept."""

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run in a folder of their own.

    Args:
      folder: made when the first checkpoint is written.
      keep: how many of the newest stay.
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
        content = {"tree": tree, "checksum": np.uint32(_checksum(tree))}
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

        One that is damaged is logged and removed, and the one before it is read.

        Args:
          like: a tree of arrays or ``jax.ShapeDtypeStruct``, with the shardings wanted.

        Returns:
          Its step and tree, or ``None`` if there is none.
        """
        if not self._folder.exists():
            return None
        content = {"tree": like, "checksum": jax.ShapeDtypeStruct((), np.uint32)}
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    found = manager.restore(
                        step, args=ocp.args.StandardRestore(content)
                    )
                    if found["checksum"] != _checksum(found["tree"]):
                        raise ValueError("its checksum does not fit")
                except Exception as error:  # whatever the storage layers raise
                    _log.warning(
                        "The checkpoint %s is damaged (%s); going back to the one "
                        "before it.",
                        self._folder / str(step),
                        str(error).splitlines()[0][:200],
                    )
                    shutil.rmtree(self._folder / str(step))
                else:
                    return step, found["tree"]
        return None

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)


def _checksum(tree: Any) -> int:
    """CRC-32 of every array's bytes: the storage does not notice a flipped bit."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, total)
    return total
