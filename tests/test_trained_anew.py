"""Models that were trained anew in the same folder are no longer what a run began with."""

import shutil

import pytest

from dpo_cli.errors import ConfigError
from small_runs import train

PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=8", "train.batch_size=8", "stage.ppo_epochs=2",
    "stage.max_new_tokens=4", "stage.normalize_prompts=4", "stage.eval_prompts=2",
    "train.max_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reward model of it."""
    home = tmp_path_factory.mktemp("anew")
    train(home / "sft", "stage=sft", "train.max_steps=2", "optim.lr=3e-3")
    reward_model(home / "reward", home / "sft", seed=0)
    return home / "sft", home / "reward"


def reward_model(folder, base, seed):
    train(folder, "stage=reward", "train.max_steps=1", "stage.normalize_prompts=0",
          f"model.path={base}", f"seed={seed}")  # fmt: skip


@pytest.mark.parametrize("changed", ["reference", "reward_fn"])
def test_a_ppo_run_goes_on_with_the_same_reference_and_reward(folders, tmp_path, changed):
    sft, _ = folders
    reward, reference = tmp_path / "reward", tmp_path / "reference"
    shutil.copytree(folders[1], reward)
    shutil.copytree(sft, reference)
    words = [
        *PPO, f"model.path={sft}", f"stage.reference={reference}", "reward_fn=reward_model",
        f"reward_fn.path={reward}",
    ]  # fmt: skip
    train(tmp_path / "r", *words)
    train(tmp_path / "r", *words, "resume=true")
    if changed == "reference":
        train(reference, "stage=sft", "train.max_steps=1", "seed=3")
    else:
        reward_model(reward, sft, seed=3)
    with pytest.raises(ConfigError, match=f"is from a different run \\({changed}: "):
        train(tmp_path / "r", *words, "resume=true")


def test_an_optimum_is_of_the_reward_model_as_it_was(folders, tmp_path):
    sft, _ = folders
    reward = tmp_path / "reward"
    shutil.copytree(folders[1], reward)
    words = [
        "stage=evaluate", f"model.path={sft}", f"stage.reference={sft}", "stage.prompts=3",
        "stage.max_new_tokens=4", "reward_fn=reward_model", f"reward_fn.path={reward}",
    ]  # fmt: skip
    train(tmp_path / "first", *words, "stage.reference_samples=16")
    again = [*words, f"stage.optimum={tmp_path / 'first'}"]
    assert "shortfall" in train(tmp_path / "again", *again)
    reward_model(reward, sft, seed=3)
    with pytest.raises(ConfigError, match="its reward_fn differs"):
        train(tmp_path / "other", *again)
