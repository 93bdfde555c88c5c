"""What can go wrong through no fault of this program, each with its exit code.

`cli.py` prints a `UserError` as one line and exits with its code; anything else
is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A problem the user can mend. The message names the place and the remedy."""

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
    """No checkpoint that verifies, or one that does not fit this run."""

    exit_code = 5


class RunLockedError(UserError):
    """Another process works in the same run folder."""

    exit_code = 6


class OutOfMemory(UserError):
    """Ranks that ran out of memory, and may start again in `run_dir` with smaller rows."""

    exit_code = 75  # start again to go on

    def __init__(self, message: str, run_dir: str) -> None:
        super().__init__(message, run_dir)
        self.run_dir = run_dir

    def __str__(self) -> str:
        return str(self.args[0])


class HangError(UserError):
    """A rank did not answer the others for hardware.timeout_seconds."""

    exit_code = 75  # start again to go on


class PeerLost(UserError):
    """A rank without the others, one of which ended: that one's error is the one to tell."""

    exit_code = 76


class DiskError(UserError):
    """A write failed: disk full, permission, I/O error."""

    exit_code = 74


class Preempted(UserError):
    """A signal asked us to stop; the state was saved and the run can be resumed."""

    exit_code = 75
