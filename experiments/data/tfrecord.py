"""TFRecord files, the format in which TFDS stores a data set unless told otherwise.

A file is one record after another, and a record is ::

    uint64 length of the content, uint32 checksum of the length,
    the content,                  uint32 checksum of the content

in little-endian order. Checksums are `masked CRC-32C
<https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>`_.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c


def read(path: Path) -> Iterator[bytes]:
    r"""The records of a file, checked.

    Args:
      path: the file.

    Yields:
      The content of each record.

    Raises:
      ValueError: if the file ends within a record, a checksum does not fit, or the
        file is compressed.

    Example:
      >>> import pathlib, tempfile
      >>> from experiments.data import tfrecord
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "omega.tfrecord"
      >>> length, content = (5).to_bytes(8, "little"), b"omega"
      >>> _ = path.write_bytes(length + b"\xea\xb2\4>" + content + b"\x89\xa4)\xff")
      >>> print(list(tfrecord.read(path)))
      [b'omega']
    """
    with path.open("rb") as file:
        while file.peek(1):
            (length,) = struct.unpack("<Q", _read(file, 8))
            yield _read(file, length)


def _read(file: BinaryIO, length: int) -> bytes:
    """So many bytes, which their checksum follows."""
    content, checksum = file.read(length), file.read(4)
    if len(checksum) < 4:
        raise ValueError(f"{file.name} ends within a record.")
    crc = google_crc32c.value(content)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    if masked != int.from_bytes(checksum, "little"):
        file.seek(0)
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{file.name} is compressed: decompress it with gunzip.")
        raise ValueError(f"{file.name} holds a record whose checksum does not fit.")
    return content
