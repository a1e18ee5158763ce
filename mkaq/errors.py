"""The errors that a user can meet: one clear message each, and the exit code that goes with it."""


class MkaqError(Exception):
    """An error with a place and a remedy.

    Args:
        what: What is wrong, in one sentence without a full stop.
        where: The file, recipe key or tensor that it concerns.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, None if where is None else str(where), fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n  fix: {self.fix}" if self.fix else "")


class UsageError(MkaqError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class UnsupportedError(MkaqError):
    """This model family or option is not supported."""

    exit_code = 3


class CheckpointError(MkaqError):
    """The input checkpoint is damaged, incomplete or unsafe."""

    exit_code = 4


class VerificationError(MkaqError):
    """Files do not match what their manifest or handoff says."""

    exit_code = 5


class ResourceError(MkaqError):
    """Not enough disk or memory."""

    exit_code = 6


class Interrupted(MkaqError):
    """The user stopped the run; the same command resumes it."""

    exit_code = 75
