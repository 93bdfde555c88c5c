"""Errors that are not bugs of this program, each with its exit code.

`cli.py` prints a `UserError` as one line and exits with its code; any other exception is a bug
and keeps its traceback.
"""


class UserError(Exception):
    """A problem the user can fix. The message says what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value that cannot work."""

    exit_code = 2


class DataError(UserError):
    """Rows or files that cannot be used."""

    exit_code = 3


class NonFiniteError(UserError):
    """NaN or infinity in a loss, gradient or weight."""

    exit_code = 4


class CheckpointError(UserError):
    """No valid checkpoint, or one that does not match this run."""

    exit_code = 5


class RunLockedError(UserError):
    """Another process is using the run folder."""

    exit_code = 6


class OutOfMemory(UserError):
    """Ranks ran out of memory; `run_dir` can be resumed with a smaller token budget."""

    exit_code = 75  # resume to continue

    def __init__(self, message: str, run_dir: str) -> None:
        super().__init__(message, run_dir)
        self.run_dir = run_dir

    def __str__(self) -> str:
        return str(self.args[0])


class HangError(UserError):
    """A collective timed out (hardware.timeout_seconds)."""

    exit_code = 75  # resume to continue


class PeerLost(UserError):
    """Lost connection to a peer rank; that rank's error has the cause."""

    exit_code = 76


class DiskError(UserError):
    """A write failed: disk full, permission, I/O error."""

    exit_code = 74


class Preempted(UserError):
    """Stopped by a signal; the state was saved and the run can be resumed."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
