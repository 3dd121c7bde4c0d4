"""One training at a time in a folder."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep everyone else out of ``folder``, which must exist; a process that is killed lets go of it.

    Raises:
        BlockingIOError: if another training is at work there, saying which process.
        OSError: if the folder can't be written.
    """
    handle = _acquire(folder / LOCK)
    try:
        yield
    finally:
        # Removed before it is let go, so that whoever has it open already sees that it is another file by then.
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)


def _acquire(path: Path) -> int:
    """A handle of ``path``, locked."""
    import fcntl  # not on Windows, where training without a folder works

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise BlockingIOError(
                f"{path.parent} is in use: {holder} trains there; wait until it has ended, or name another folder"
            ) from error
        except OSError as error:  # there are file systems without locks
            warnings.warn(f"{path.parent} can't be locked ({error.strerror}): train there only once", stacklevel=2)
            return handle
        if _is_still(handle, path):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    """Whether ``path`` is the open file, and not one made after a training that has ended removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
