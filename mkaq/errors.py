"""The errors that users see: one clear message each, with its exit code."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when nothing more can be written."""


class MkaqError(Exception):
    """An error with its location and a remedy.

    Args:
        what: What is wrong, in one sentence without a full stop.
        where: The file, recipe key or tensor concerned.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(what)

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        return f"{prefix}{self.what}" + (f"\n  fix: {self.fix}" if self.fix else "")


class UsageError(MkaqError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class UnsupportedError(MkaqError):
    """The model family or option is not supported."""

    exit_code = 3


class CheckpointError(MkaqError):
    """The input checkpoint is damaged, incomplete or unsafe."""

    exit_code = 4


class VerificationError(MkaqError):
    """Files do not match their manifest or handoff, or a model is not as good as its run demands."""

    exit_code = 5


class ResourceError(MkaqError):
    """Not enough disk or memory."""

    exit_code = 6


class Interrupted(MkaqError):
    """The user stopped the run; the same command resumes it."""

    exit_code = 75


def as_mkaq_error(error: BaseException) -> MkaqError:
    """Converts any error to the one that the user is shown."""
    match error:
        case MkaqError():
            return error
        case KeyboardInterrupt():
            return Interrupted("interrupted", fix="the same command resumes a `run`; any other begins anew")
        case OSError():
            return _os_error(error)
        case MemoryError():
            return ResourceError("out of memory", fix="fewer or shorter samples, or a larger machine")
    if hasattr(error, "format_message"):  # raised by typer for a wrong command line
        return UsageError(error.format_message(), fix="see --help")
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported here
        return ResourceError(f"out of memory on the device: {error}", fix="fewer or shorter samples")
    message = f"a fault of mkaq itself: {type(error).__name__}: {error}"
    return MkaqError(message, fix="please report it, with what --debug shows")


def _os_error(error: OSError) -> MkaqError:
    if error.errno in DISK_FULL:
        fix = "free some, or use --output; the same command resumes"
        return ResourceError("the disk is full", where=error.filename, fix=fix)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        fix = "check its permissions; a run goes elsewhere with --output"
        return UsageError("may not be written or read", where=error.filename, fix=fix)
    return UsageError(str(error.strerror or error), where=error.filename)
