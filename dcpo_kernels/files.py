"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path`, of the same suffix, at which to make a file or a folder.

    At the end it takes the place of whatever was at `path`; after an error nothing of it is left,
    and `path` is as it was. The folders above are made. OSError where that can't be done.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{os.getpid()}.{age}.{path.name}") for age in ("new", "old"))
    _remove(new)
    try:
        yield new
        if new.is_dir() and path.exists():  # no folder is renamed onto one that holds something
            os.rename(path, old)
            try:
                os.rename(new, path)
            except BaseException:
                os.rename(old, path)
                raise
            _remove(old)
        else:
            os.replace(new, path)
    finally:
        _remove(new)


def check_writable(path: str | os.PathLike[str]) -> None:
    """OSError where no file can be written at `path`: before the work, and not after it."""
    path = Path(path)
    probe = path.with_name(f".{os.getpid()}.probe.{path.name}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))  # on a full disk an empty file is no proof
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
