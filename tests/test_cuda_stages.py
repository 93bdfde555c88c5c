"""Every stage by its real command on a GPU, against the same command in float32 on the CPU.

Skipped without a device; see gpu_runs.py.
"""

from __future__ import annotations

import json
import math

import pytest

from gpu_runs import DEVICE, HERE, ON_CPU, RUN, SAMPLES, SMALL, TRAIN, Chain, chain

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(125)]
LEARN = ("optim.lr=3e-3",)
PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=16", "train.batch_size=8", "stage.ppo_epochs=2",
    "stage.max_new_tokens=12", "stage.normalize_prompts=8", "stage.eval_prompts=4",
    "train.max_steps=8", "stage.no_eos_score=null", "optim.lr=1e-4", *SAMPLES,
)  # fmt: skip


def training(where: tuple[str, ...]) -> list[tuple[str, ...]]:
    """sft, dpo and reward, each from the one before it."""
    both = (*SMALL, *RUN, *TRAIN, *LEARN, *where)
    after = (*RUN, *TRAIN, *LEARN, *where, "model=custom", "model.path=sft")
    return [
        (*both, *SAMPLES, "stage=sft", "run_dir=sft"),
        (*after, *SAMPLES, "stage=dpo", "run_dir=dpo"),
        (*after, "stage=reward", "run_dir=reward", "stage.normalize_prompts=16",
         "stage.normalize_max_new_tokens=12"),
    ]  # fmt: skip


def others(where: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What takes the trained folders."""
    common = (*RUN, *where, "model=custom")
    sampling = ("stage.max_new_tokens=16", "stage.batch_size=32")
    reward = ("reward_fn=reward_model", "reward_fn.path=reward")
    return [
        (*common, *PPO, "model.path=sft", "run_dir=ppo", *reward),
        (*common, *sampling, "stage=sample", "model.path=dpo", "run_dir=samples",
         "stage.prompts=12", "stage.completions=3", "stage.temperatures=[0.0,1.0]"),
        (*common, "stage=label", "model.path=dpo", "run_dir=pairs", "stage.samples=samples",
         *reward),
        (*common, *sampling, "stage=evaluate", "model.path=dpo", "run_dir=evaluation", *reward,
         "stage.prompts=12", "stage.reference_samples=16", "stage.opponent=chosen",
         "stage.pairs=pairs/train.jsonl"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return chain(tmp_path_factory, "stages", [*training(HERE), *others(HERE)])


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return chain(tmp_path_factory, "truth", training(ON_CPU))


def test_every_stage_ends_well(here: Chain) -> None:
    here.ended(0, 0, 0, 0, 0, 0, 0)
    for run in ("sft", "dpo", "reward", "ppo"):
        assert all(map(math.isfinite, here.losses(run))), run
        assert (here.folder / run / "final" / "model.safetensors").is_file()


def test_losses_are_those_of_float32_on_the_cpu(here: Chain, truth: Chain) -> None:
    assert here.losses("sft") == pytest.approx(truth.losses("sft"), abs=1e-2)
    assert truth.losses("sft")[-1] < truth.losses("sft")[0] - 0.1  # it learns
    assert here.losses("dpo")[0] == pytest.approx(math.log(2), abs=2e-3)
    assert here.losses("reward") == pytest.approx(truth.losses("reward"), abs=3e-2)
    assert here.column("sft", "grad_norm") == pytest.approx(
        truth.column("sft", "grad_norm"), rel=0.05
    )


def test_a_step_waits_for_the_device_twice(here: Chain) -> None:
    """For its figures and for the norm of its gradients."""
    if DEVICE != "cuda":
        pytest.skip("a CPU has nothing to wait for")
    for number, run in enumerate(("sft", "dpo", "reward", "ppo")):
        later = here.results[number]["syncs"][2:]  # the first steps set libraries up
        assert later, run
        assert max(map(len, later)) <= 2, (run, later[0])


def test_the_policy_of_a_first_rollout_is_the_reference(here: Chain) -> None:
    rows = here.column("ppo", "kl")
    assert rows[0] == pytest.approx(0.0, abs=0.05)
    assert here.column("ppo", "approx_kl")[0] == pytest.approx(0.0, abs=2e-3)
    facts = json.loads((here.folder / "reward" / "final" / "dpo_run.json").read_text())
    assert facts["normalisation"]["std"] > 0


def test_an_evaluation_measures_reward_kl_optimum_and_win_rate(here: Chain) -> None:
    point = here.summary("evaluation")
    assert point["kl"] >= 0
    assert point["kl"] == pytest.approx(point["kl_sampled"], abs=4 * point["kl_sampled_se"] + 0.05)
    assert 0 <= point["win_rate_t1"] <= 1
    assert 0.3 < point["likelihood_accuracy"] <= 1
    assert math.isfinite(point["shortfall"])
    rows = [json.loads(r) for r in (here.folder / "samples/train.jsonl").read_text().splitlines()]
    assert [len(row["completions"]) for row in rows] == [1, 3] * 12
