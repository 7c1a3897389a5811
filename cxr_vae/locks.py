"""One process at a time on a directory that is written to."""

import errno
import fcntl
import math
import os
import socket
import sys
import time
from pathlib import Path

from cxr_vae.errors import UserError

LOCK = ".lock"

WAIT_S = 20.0
"""The last one may still be leaving: ranks whose torchrun was killed save a checkpoint first."""

OTHER_HOST_WAIT_S = 180.0
"""The file server keeps the lock of a machine that died for as long as its lease, with NFSv4 90 s."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


_HELD: set["DirectoryLock"] = set()
"""Else one that nobody remembers would be closed with its file."""


class DirectoryLock:
    """The lock of a directory, held until `release` or the end of the process, however that comes about.

    A POSIX record lock on a file in it: the kernel, or the server of a network file system, lets go of it with
    the process or the machine, so none is ever left behind; children don't inherit it. Raises UserError where another
    process still has it after `wait_s`; one on another machine, after OTHER_HOST_WAIT_S, unless `wait_s` is 0.
    """

    def __init__(self, directory: Path, wait_s: float = WAIT_S) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / LOCK).open("a+")
        began, waiting = time.monotonic(), False
        while not self._try():
            self._file.seek(0)
            named = self._file.read().strip()
            elsewhere = named and f" on {socket.gethostname()} since " not in named
            patience_s = max(wait_s, OTHER_HOST_WAIT_S) if wait_s and elsewhere else wait_s
            holder = f"{directory} is in use by {named or 'another process'}"
            if time.monotonic() >= began + patience_s:
                raise UserError(f"{holder}: wait for it, stop it, or name another directory")
            if not waiting:
                limit = f" {patience_s:.0f} s" if math.isfinite(patience_s) else ""
                print(f"{holder}; waiting{limit} for it to leave", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(0.2)
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self._file.flush()
        _HELD.add(self)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: the file system of {self._file.name} has no locks: see to it that nothing else writes there",
                file=sys.stderr,
                flush=True,
            )
        return True

    def release(self) -> None:
        """Lets the next one in, and leaves the file empty: folders made alike are alike byte for byte."""
        _HELD.discard(self)
        self._file.truncate(0)
        self._file.close()
