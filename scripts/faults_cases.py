"""The rows of the table: number, what is injected, what must happen, who finds out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import faults_saves as saves
from faults_lab import Lab


@dataclass(frozen=True)
class Case:
    """run: does it, and returns what was seen; raises Failed where that is not what must be."""

    number: str
    name: str
    required: str
    run: Callable[[Lab], str]


CASES = [
    Case("1", "kill -9 at random points after the first save, sft, dpo, reward, ppo, lora",
         "every start resumes; final weights' sha256 as uninterrupted", saves.kill_loop),
    Case("2", "kill -9 before every file-system operation of a save",
         "every resume works, identical", saves.operations_of_a_save),
    Case("3", "half-written file, then kill -9", "every resume works, identical",
         saves.half_written),
    Case("9", "trace one save", "files and folder synced, the rename last", saves.trace),
    Case("13", "kill -9 before every operation of a prune", "newest checkpoint still valid",
         saves.killed_in_a_prune),
]  # fmt: skip
