"""What lies below a folder, and whether mkaq made it. No link is followed."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mkaq.errors import VerificationError
from mkaq.run.publish import HANDOFF, read_handoff


def walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything below a folder but folders; what vanishes meanwhile is left out.

    Raises:
        OSError: If a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        for name in [*files, *folders]:
            path = Path(place, name)
            with suppress(FileNotFoundError):
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    yield path, status


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of the files below a folder as far as it can be read."""
    size = 0
    with suppress(OSError):
        if not is_folder(path):
            return path.lstat().st_size
        for _, status in walk(path):
            size += status.st_size
    return size


def foreign_in(stage: Path) -> str:
    """Why a stage's folder may hold what mkaq did not make; empty if it does not."""
    try:
        known = {HANDOFF, *(file["path"] for file in read_handoff(stage / HANDOFF)["files"])}
        for path, status in walk(stage):
            if not stat.S_ISREG(status.st_mode) or str(path.relative_to(stage)) not in known:
                return f"it holds {path.name}, which mkaq did not make"
    except VerificationError as error:
        return error.what
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return ""
