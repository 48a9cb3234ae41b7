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
      >>> from experiments.engine.checkpoint import Checkpoints
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
          tree: arrays, sharded or not, and numbers.

        Raises:
          TypeError: if a leaf of the tree is something else.
          ValueError: if ``step`` is not larger than those before.
        """
        tree = _stored(tree)
        content = {"tree": tree, "checksum": np.asarray(_checksum(tree), np.uint32)}
        newest = None
        try:
            with self._manager() as manager:
                newest = manager.latest_step()
                if newest is None or step > newest:
                    manager.save(step, args=ocp.args.StandardSave(content))
        except (OSError, ValueError) as error:
            _log.warning(
                "No checkpoint could be written to %s: %s. The run goes on; make room, "
                "or what comes from here on is lost if it is interrupted.",
                self._folder,
                str(error).splitlines()[0],
            )
        # Out here, or the handler would take it for the storage's error.
        if newest is not None and step <= newest:
            raise ValueError(
                f"step {step} is not above the newest checkpoint, {newest}, in "
                f"{self._folder}: nothing was saved."
            )

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Read the newest checkpoint that is intact.

        One that is damaged is logged and put aside, and the one before it is read.

        Args:
          like: a tree of arrays or ``jax.ShapeDtypeStruct``, with the shardings wanted.

        Returns:
          Its step and tree, or ``None`` if there is none.

        Raises:
          TypeError: if a leaf of ``like`` could not be saved.
          ValueError: if ``like`` has other leaves, shapes or dtypes than the
            checkpoint, which stays where it is.
        """
        stored = _stored(like)
        if not self._folder.exists():
            return None
        content = {"tree": stored, "checksum": np.zeros((), np.uint32)}
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                wrong, tree, path = "", None, self._folder / str(step)
                try:
                    leaves = _leaves(manager.item_metadata(step).tree)
                    if not (differences := _differences(leaves, _leaves(content))):
                        contents = manager.restore(
                            step, args=ocp.args.StandardRestore(content)
                        )
                        tree = contents["tree"]
                        if contents["checksum"] != _checksum(tree):
                            wrong = "its checksum does not fit"
                except Exception as error:  # whatever the storage layers raise
                    differences = []
                    wrong = [*str(error).splitlines(), type(error).__name__][0][:200]
                if differences:
                    raise ValueError(
                        f"The checkpoint {path} is of another tree: "
                        f"{'; '.join(differences[:3])}. It stays where it is."
                    )
                if not _anywhere(bool(wrong)):
                    return step, jax.tree.map(_as_asked, tree, like)
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
        return ocp.CheckpointManager(
            self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )


# --- What the storage takes -----------------------------------------------------------

_NOTHING = np.zeros(1, np.uint8)  # in the place of an array of size 0


def _stored(tree: Any) -> Any:
    """The tree as it is stored: keys as their words, no array that is empty."""

    def leaf(path: Any, x: Any) -> Any:
        if isinstance(x, (bool, int, float)):
            return x
        if not hasattr(x, "dtype") or getattr(x.dtype, "kind", "V") in "OSU":
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"checkpoints hold arrays; {name} is a {type(x).__name__}.")
        if x.size == 0:
            return _NOTHING
        if _is_key(x) and isinstance(x, jax.ShapeDtypeStruct):
            words = jax.eval_shape(jax.random.key_data, x)
            place = x.sharding
            return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=place)
        if _is_key(x):
            return jax.random.key_data(x)
        return np.asarray(x) if isinstance(x, np.generic) else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _as_asked(leaf: Any, like: Any) -> Any:
    """A leaf from :func:`_stored`, as that of ``like``."""
    if not hasattr(like, "dtype"):
        return leaf
    if like.size == 0:
        empty = np.zeros if isinstance(like, np.ndarray) else jnp.zeros
        return empty(like.shape, like.dtype)
    if _is_key(like):
        kinds: list[Any] = []
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)
        return jax.random.wrap_key_data(leaf, impl=kinds[0])
    return leaf


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Dtype and shape of every leaf, by path; a number has no dtype."""
    return {
        tuple(map(_word, path)): (getattr(x, "dtype", None), getattr(x, "shape", ()))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _word(key: Any) -> str:
    """A step of a path, however the node that it leads out of is called."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _differences(stored: dict[Any, Any], asked: dict[Any, Any]) -> list[str]:
    """What the leaves of a checkpoint and of what is asked for differ in, in words."""

    def same(leaf: Any, other: Any) -> bool:
        if None in (leaf, other) or tuple(leaf[1]) != tuple(other[1]):
            return leaf is other
        return None in (leaf[0], other[0]) or leaf[0] == other[0]

    def words(leaf: Any) -> str:
        return "not there" if leaf is None else f"{leaf[0] or 'a number'} {leaf[1]}"

    return [
        f"{'/'.join(path[1:])} is {words(stored.get(path))} in it, "
        f"{words(asked.get(path))} in what is asked for"
        for path in {**asked, **stored}
        if not same(stored.get(path), asked.get(path))
    ]


def _checksum(tree: Any) -> np.uint32:
    """The sum of every array's words: the storage does not notice a flipped bit."""
    sums = [int(_sum_of_words(x)) for x in jax.tree.leaves(tree)]
    return np.uint32(sum(sums) % 2**32)


@jax.jit
def _sum_of_words(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype.name in ("int2", "uint2", "int4", "uint4"):
        x = x.astype(jnp.int8)
    if x.dtype != bool:
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        x = jax.lax.bitcast_convert_type(x, width)
    return jnp.sum(x, dtype=jnp.uint32)


def _anywhere(flag: bool) -> bool:
    """Whether it is so on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())
