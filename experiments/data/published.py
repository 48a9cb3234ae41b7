"""MNIST and CIFAR in the files they are published as, and as others keep those."""

import gzip
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.datasets import DataError, Examples


class Original(NamedTuple):
    """The files a data set is published as, and how to read them."""

    shape: tuple[int, int, int]
    classes: int
    base: str
    files: tuple[str, ...]
    read: Callable[[list[Path]], tuple[Examples, Examples]]


def raw_mnist(folder: Path) -> Path:
    """Where torchvision keeps the published files, in its folder or that one itself."""
    for raw in (folder / "raw", folder):
        # Not FashionMNIST's, whose files are called the same.
        if raw.parts[-2:] == ("MNIST", "raw") and raw.is_dir():
            return raw
    return folder / "MNIST" / "raw"


def idx_file(raw: Path, name: str) -> Path | None:
    """A published file, compressed or not."""
    both = (raw / name, raw / name.removesuffix(".gz"))
    return next((path for path in both if path.is_file()), None)


def from_files(name: str, folder: Path) -> tuple[Examples, Examples] | None:
    """MNIST as torchvision or Keras keep it, if it is there and whole."""
    if name != "mnist":
        return None
    raw, keras = raw_mnist(folder), folder / "mnist.npz"
    paths = [idx_file(raw, file) for file in ORIGINALS[name].files]
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


ORIGINALS = {
    "mnist": Original(
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
    "cifar10": Original(
        (32, 32, 3),
        10,
        "https://www.cs.toronto.edu/~kriz/",
        ("cifar-10-binary.tar.gz",),
        _read_cifar(
            1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
        ),
    ),
    "cifar100": Original(
        (32, 32, 3),
        100,
        "https://www.cs.toronto.edu/~kriz/",
        ("cifar-100-binary.tar.gz",),
        _read_cifar(2, ("train.bin",), ("test.bin",)),
    ),
}
