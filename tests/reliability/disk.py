"""A disk that fails: the n-th time that something changes on it, the process dies or gets an error.

Python announces what opens, renames, makes or removes files (PEP 578); what it does not announce (pwrite,
fallocate, fsync) is wrapped. What the safetensors library writes is seen by the sync that follows it.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Fault = Literal["kill", "power", "full", "error"]
_ANNOUNCED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"}
_ANNOUNCED |= {"shutil.copyfile"}
_WRITES = os.O_WRONLY | os.O_RDWR
_WRAPPED = ("pwrite", "posix_fallocate", "fsync", "fdatasync")
_NEEDS_ROOM = {"open", "os.mkdir", "os.symlink", "pwrite", "posix_fallocate", "shutil.copyfile"}
_CAN_FAIL = {"open", "os.rename", "pwrite", "fsync", "fdatasync"}
_CODES = {"full": errno.ENOSPC, "error": errno.EIO}


class Disk:
    """What happens below a folder.

    Args:
        folder: Only changes below it count.
        at: The number of the change that meets the fault; 0 for none.
        fault: `kill` ends the process there. `power` ends it too, and takes what was not synced. `full` lets
            nothing be written from there on. `error` is one EIO.

    Attributes:
        calls: What has happened so far: the name of each call.
    """

    def __init__(self, folder: Path, at: int = 0, fault: Fault = "kill") -> None:
        self.folder, self.at, self.fault = str(folder), at, fault
        self.calls: list[str] = []
        self._synced: dict[int, tuple[int, int]] = {}  # inode: size and time of change
        self._renamed: list[tuple[str, str]] = []  # in folders that have not been synced since
        self._met = self._busy = False

    def watch(self) -> None:
        """Begins, with everything that is there safe on the disk; it cannot be undone in this process."""
        for path in Path(self.folder).rglob("*"):
            found = path.stat()
            self._synced[found.st_ino] = found.st_size, found.st_mtime_ns
        sys.addaudithook(self._announced)
        for name in _WRAPPED:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _announced(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or event not in _ANNOUNCED or (event == "open" and not (arguments[2] or 0) & _WRITES):
            return
        # a link's second path is the one that is made
        path = str(arguments[1] if event in ("os.symlink", "shutil.copyfile") else arguments[0])
        if path.startswith(self.folder):
            self._happens(event)
            if event == "os.rename":
                self._renamed.append((path, str(arguments[1])))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def happens(handle: int, *arguments: Any) -> Any:
            path = str(Path(f"/proc/self/fd/{handle}").readlink())
            if not path.startswith(self.folder) or self._busy:
                return call(handle, *arguments)
            torn = None
            if name == "pwrite":  # half of it is written before the process ends
                data, offset = arguments
                torn = lambda: call(handle, bytes(data)[: len(data) // 2], offset)  # noqa: E731
            self._happens(name, torn)
            result = call(handle, *arguments)
            if name in ("fsync", "fdatasync"):
                self._note_sync(handle, path)
            return result

        return happens

    def _note_sync(self, handle: int, path: str) -> None:
        found = os.fstat(handle)
        self._synced[found.st_ino] = found.st_size, found.st_mtime_ns
        self._renamed = [pair for pair in self._renamed if str(Path(pair[1]).parent) != path]

    def _happens(self, name: str, torn: Callable[[], Any] | None = None) -> None:
        self.calls.append(name)
        self._met = self._met or len(self.calls) == self.at
        if not self._met:
            return
        if self.fault in ("kill", "power"):
            self._busy = True
            if torn is not None:
                torn()
            if self.fault == "power":
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        if name in (_NEEDS_ROOM if self.fault == "full" else _CAN_FAIL):
            self._met = self.fault == "full"
            code = _CODES[self.fault]
            raise OSError(code, os.strerror(code))

    def _lose(self) -> None:
        """Undoes renames in folders that were not synced, and blanks files that were not."""
        for old, new in reversed(self._renamed):
            if os.path.lexists(new) and not os.path.lexists(old):
                Path(new).rename(old)
        for path in Path(self.folder).rglob("*"):
            if path.is_file() and not path.is_symlink():
                found = path.stat()
                if self._synced.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                    path.write_bytes(bytes(found.st_size))
