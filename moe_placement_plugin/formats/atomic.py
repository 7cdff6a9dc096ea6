"""Read and write small files: atomically, without pickles, with errors that name the mend."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import PlacementError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        PlacementError: when the file cannot be written; the old one is untouched then.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as handle:
            temporary = handle.name
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise PlacementError(
            f"{path} cannot be written ({error.strerror or error}): give a writable path"
        ) from error


def remove_unfinished(path: str | Path) -> None:
    """Remove what a process that was killed within `write_atomically` has left beside ``path``.

    Nobody may be writing it.
    """
    path = Path(path)
    for left in glob.glob(f".{glob.escape(path.name)}.{'?' * 8}", root_dir=path.parent):
        (path.parent / left).unlink(missing_ok=True)


def read_bytes(path: str | Path, what: str) -> bytes:
    """Read a whole file.

    Args:
        path: the file.
        what: what the user meant it to be, for messages.

    Raises:
        PlacementError: when it is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PlacementError(f"{path} does not exist: give the path of a {what} file") from None
    except OSError as error:
        raise PlacementError(
            f"{path} cannot be read ({error.strerror or error}): give the path of a {what} file"
        ) from error


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file; ``what`` says in messages what the user meant it to be.

    Raises:
        PlacementError: when it is missing, cannot be read or is not JSON.
    """
    return parse_json(read_bytes(path, what), path, what)


def parse_json(content: bytes, path: str | Path, what: str) -> Any:
    """Parse the ``content`` of the JSON file ``path``; ``what`` says what it should be.

    Raises:
        PlacementError: when it is not JSON.
    """
    try:
        return json.loads(content.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlacementError(f"{path} is not JSON ({error}): give a {what} file") from None
