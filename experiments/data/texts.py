"""Texts to train on: what Python itself ships, or files of one's own."""

import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.engine.command import UserError


def prose() -> bytes:
    """The help that Python's ``help()`` shows of keywords and topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def source(package: str, name: str = "*.py") -> bytes:
    """The modules of one of the standard library's packages, by name."""
    files = importlib.resources.files(package).iterdir()
    by_name = {x.name: x for x in files if Path(x.name).match(name)}
    return b"".join(by_name[name].read_bytes() for name in sorted(by_name))


SHIPPED = {
    "prose": prose,
    "code": lambda: source("asyncio"),
    "tables": lambda: source("encodings", "cp*.py"),  # of characters and their names
}


def shipped(name: str) -> bytes:
    """One of :data:`SHIPPED`.

    Raises:
      UserError: if this Python has it not.
    """
    try:
        text = SHIPPED[name]()
    except (ImportError, OSError) as error:
        text, reason = b"", f": {error}"
    else:
        reason = ""
    if not text:
        raise UserError(
            f"this Python does not ship the {name} to train on{reason}. Give texts of "
            "your own: --old FILE --new FILE."
        )
    return text


def read(files: Sequence[Path]) -> bytes:
    """Files of any kind, one behind the other.

    Raises:
      UserError: if one cannot be read or is empty.
    """
    contents = []
    for file in files:
        try:
            contents.append(file.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.") from error
        if not contents[-1]:
            raise UserError(f"{file} is empty: there is nothing to train on.")
    return b"".join(contents)


def check(texts: dict[str, bytes], least: int) -> None:
    """Refuse texts that are too short, or the same.

    Args:
      texts: by name.
      least: how many bytes each must have.

    Raises:
      UserError: naming the text.
    """
    names: dict[str, str] = {}
    for name, text in texts.items():
        if len(text) < least:
            raise UserError(
                f"the {name} text has {len(text):,} bytes, too few: {least:,} at least "
                "are needed, so that a tenth of it can be held out. Give more, or a "
                "shorter --length."
            )
        digest = sha256(text)
        if digest in names:
            raise UserError(
                f"the {names[digest]} text and the {name} text are the same: there is "
                "nothing to forget. Give two texts that differ."
            )
        names[digest] = name


def sha256(text: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(text).hexdigest()


def bytes_of(text: bytes) -> np.ndarray:
    """uint8 ``(bytes,)``."""
    return np.frombuffer(text, np.uint8)
