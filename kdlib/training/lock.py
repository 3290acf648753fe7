"""One process at a time in a run's folder."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".lock"

if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[str]) -> None:
        file.seek(1 << 30)  # a locked byte cannot be read, and the name of the holder shall be
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(file: IO[str]) -> None:
        # lockf, not flock: the lock is the process's own, so that worker processes which outlive it do not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, this process has ``folder`` (which exists) for itself; a process that ends in any way lets it go.

    Raises:
        BlockingIOError: another process has it; says which.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            _take(file)
        except OSError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise BlockingIOError(f"{folder} is in use by {holder}") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
