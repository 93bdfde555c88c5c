"""A session that only scores, for tests of rewards."""

from dpo_cli.report.console import Progress
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import load_scorer
from dpo_cli.session.session import Session
from dpo_cli.train.runtime import start_runtime
from small_runs import TINY, configure


def session_of(folder, *words):
    """A session that scores, and the lines it says."""
    config = configure(*TINY, "stage=label", f"stage.samples={folder}", f"run_dir={folder}", *words)
    progress, said = Progress("off"), []
    progress.note = said.append
    return Session(config, folder, start_runtime(config.hardware, 0), progress, []), said


def scorer(folder, *words):
    return load_scorer(session_of(folder, *words)[0])


def texts(*completions, prompt=""):
    return [Completed(prompt, text) for text in completions]
