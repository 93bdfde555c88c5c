"""A loss and a reward in a file of the user's: what they compute, and how their errors are told."""

import math
import re
import shutil

import pytest
import torch

from composing import problems
from dpo_cli.config.paths import recipes_dir
from dpo_cli.errors import ConfigError
from dpo_cli.losses import RankedLogprobs
from dpo_cli.losses.pairwise import file_loss
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import OwnScorer
from dpo_cli.user_code import user_function
from small_runs import TINY, metrics

LOSS, REWARD = recipes_dir() / "my_loss.py", recipes_dir() / "my_reward.py"
PAIR = RankedLogprobs(
    torch.tensor([[-9.0, -14.0]]), torch.tensor([[-10.0, -12.0]]), torch.ones(1, 2)
)


def scorer(path) -> OwnScorer:
    return OwnScorer(user_function("reward_fn.file", str(path), "reward"))


def test_the_example_loss_by_hand():
    expected = math.log(1 + math.exp(-(0.1 * 3 - 1)))
    assert file_loss(PAIR, 0.1, str(LOSS)).item() == pytest.approx(expected, rel=1e-6)


def test_the_example_reward_by_hand():
    rows = [Completed("A film", " good good bad"), Completed("A film", "")]
    assert scorer(REWARD)(rows) == [2.0, 0.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def loss(:\n", "does not run: line 1: SyntaxError: "),
        ("import no_such_module\n", "does not run: ModuleNotFoundError: No module named"),
        ("def los(logprobs, beta): ...\n", "defines no function loss()"),
        ("def loss(logprobs, beta):\n    return 1 / 0\n",
         "loss() raised ZeroDivisionError: division by zero\n  line 2, in loss: return 1 / 0"),
        ("def loss(logprobs, beta):\n    return logprobs.policy\n",
         "loss() returned shape (1, 2), not one loss per pair"),
        ("def loss(logprobs, beta):\n    return 1.0\n",
         "loss() returned shape (), not one loss per pair"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_loss_is_told(tmp_path, source, message):
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=re.escape(f"stage.loss_file={path}: {message}")):
        file_loss(PAIR, 0.1, str(path))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "reward() returned no list of numbers: 'int' object is not iterable"),
        ("return ['good']", "reward() returned no list of numbers: could not convert"),
        ("return [1.0, 2.0]", "reward() returned 2 numbers for 1 completions"),
    ],
)
def test_what_is_wrong_with_a_reward_is_told(tmp_path, body, message):
    path = tmp_path / "own.py"
    path.write_text(f"def reward(prompts, completions):\n    {body}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        scorer(path)([Completed("A film", " good")])


def test_running_out_of_memory_is_left_to_the_loop(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\ndef loss(logprobs, beta):\n    raise torch.OutOfMemoryError('much')\n"
    )
    with pytest.raises(torch.OutOfMemoryError):
        file_loss(PAIR, 0.1, str(path))


def test_the_folder_of_the_file_is_not_importable(tmp_path):
    (tmp_path / "neighbor.py").write_text("")
    path = tmp_path / "own.py"
    path.write_text("import neighbor\n")
    with pytest.raises(ConfigError, match="No module named 'neighbor'"):
        user_function("stage.loss_file", str(path), "loss")


def test_only_the_command_line_may_name_a_file():
    for words in (
        ["stage=dpo", "stage.loss=file", f"stage.loss_file={LOSS}"],
        ["stage=ppo-baseline", "reward_fn=python", f"reward_fn.file={REWARD}"],
    ):
        key = words[-1].partition("=")[0]
        assert problems(words)[0].startswith(f"{key}=")
        assert "runs foreign code" in problems(words)[0]
    assert problems(["stage=dpo", "stage.loss=file"]) == [
        "stage.loss=file needs stage.loss_file=<Python file with loss(logprobs, beta)>"
    ]
    assert problems(["stage=ppo-baseline", "reward_fn=python"]) == [
        "reward_fn=python needs reward_fn.file=<file with reward(prompts, completions)>"
    ]


def test_a_run_with_an_own_loss_knows_its_content(tmp_path, cli):
    path = tmp_path / "own.py"
    path.write_text(LOSS.read_text())
    words = ("stage=dpo", "stage.loss=file", f"stage.loss_file={path}", f"run_dir={tmp_path / 'r'}")
    done = cli(*words, *TINY, "train.max_steps=2", "train.save_every_steps=1")
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in metrics(tmp_path / "r") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(1 + math.e), rel=1e-6)
    (tmp_path / "r" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "r" / "final")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-2")
    path.write_text(LOSS.read_text().replace("1.0", "2.0"))
    done = cli(f"resume={tmp_path / 'r'}", f"stage.loss_file={path}")
    assert done.returncode == 2
    assert "loss_file" in done.stderr
