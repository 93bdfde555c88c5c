"""Advantages without a critic and estimators of the KL: by hand, by enumeration, in whole runs."""

from dataclasses import replace

import pytest
import torch

from dpo_cli import packing
from dpo_cli.durable import file_digest
from dpo_cli.errors import ConfigError
from dpo_cli.losses.ppo import group_relative, kl_penalty, leave_one_out, policy_loss, token_shares
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.report.console import Progress
from dpo_cli.session.models import load_policy_and_data
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.session import Session
from dpo_cli.stages import ppo_baseline, rollout
from dpo_cli.stages.advantages import Tokens, estimate
from dpo_cli.stages.ppo_objective import ppo_loss
from dpo_cli.train import checkpoint
from dpo_cli.train.runtime import start_runtime
from small_runs import TINY, configure, killed_at, metrics, train

PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=16", "train.batch_size=8", "stage.ppo_epochs=2",
    "stage.max_new_tokens=6", "stage.normalize_prompts=8", "stage.eval_prompts=4",
    "optim.lr=1e-3", "stage.no_eos_score=null", "reward_fn=length",
)  # fmt: skip
LENGTHS = torch.tensor([2, 1, 1, 1])
LOGRATIOS = [[1.0, -2.0, 4.0], [0.5, -0.5]]  # two prompts with two completions each
SCORES = torch.tensor([3.0, -1.0, 2.0, 2.0])


def test_hand_worked_advantages_of_a_group():
    """Rewards 1, 2, 6. Others: 4, 3.5, 1.5. Mean 3, squares of deviations 4 + 1 + 9, over 2: 7."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    assert group_relative(rewards, scaled=False).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    scaled = group_relative(rewards, scaled=True)
    assert scaled[0].tolist() == pytest.approx([x / 7**0.5 for x in (-2, -1, 3)], abs=1e-4)
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "advantages"),
    [
        # KL weight 0.1: rewards 3 - 0.1 (1 - 2) = 3.1, -1 - 0.4 = -1.4 | 2 - 0.05, 2 + 0.05
        ({"advantage": "rloo"}, [4.5, 4.5, -4.5, -0.1, 0.1]),
        ({"advantage": "rloo", "kl_in": "loss"}, [4.0, 4.0, -4.0, 0.0, 0.0]),
        ({"advantage": "grpo", "group_std": False}, [2.25, 2.25, -2.25, -0.05, 0.05]),
        # of two rewards d apart: +- (d / 2) / (d / sqrt 2)
        ({"advantage": "grpo", "kl_in": "loss"}, [0.7071, 0.7071, -0.7071, 0.0, 0.0]),
        # to come: -0.1 + 3.2, 3.2, -1.4, 1.95, 2.05; mean 1.78, mean square of deviations 2.7946
        ({"advantage": "reinforce++"}, [0.7896, 0.8494, -1.9022, 0.1017, 0.1615]),
        ({"advantage": "reinforce++", "whiten_advantages": False}, [3.1, 3.2, -1.4, 1.95, 2.05]),
        # discounted by a half: -0.1 + 1.6
        (
            {"advantage": "reinforce++", "whiten_advantages": False, "gamma": 0.5},
            [1.5, 3.2, -1.4, 1.95, 2.05],
        ),
    ],
)
def test_hand_worked_advantages_of_a_rollout(keys, advantages):
    stage = replace(ppo_baseline.PpoConfig(), completions=2, **keys)
    tokens = [Tokens(torch.tensor(part), torch.zeros(len(part))) for part in LOGRATIOS]
    figures = estimate(tokens, SCORES, LENGTHS, stage, kl_coef=0.1)
    assert torch.cat([t.advantages for t in tokens]).tolist() == pytest.approx(advantages, abs=1e-4)
    assert figures == {"score_normalised": 1.5}  # none of a critic
    assert all(t.returns is None for t in tokens)


def test_hand_worked_shares_of_tokens():
    """Two completions, of 2 tokens and of 1, of at most 4."""
    lengths = torch.tensor([2, 2, 1])
    assert token_shares(lengths, "tokens", 4).tolist() == [1.0, 1.0, 1.0]
    assert token_shares(lengths, "sequences", 4).tolist() == [0.5, 0.5, 1.0]
    assert token_shares(lengths, "constant", 4).tolist() == [0.25, 0.25, 0.25]


def test_gradients_of_the_kl_estimators_on_a_categorical():
    """Expectations over all tokens of pi against autograd's gradient of the enumerated KL."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    policy, reference = logits.log_softmax(0), torch.randn(7, dtype=torch.float64).log_softmax(0)
    weights = policy.exp().detach()
    x = policy - reference

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    kl = (policy.exp() * x).sum()
    reverse, forward = gradient(kl), gradient(-(reference.exp() * policy).sum())
    in_loss = {name: gradient((weights * kl_penalty(x, name)).sum()) for name in ("k2", "k3")}
    assert torch.allclose(in_loss["k2"], reverse)
    assert torch.allclose(in_loss["k3"], forward)
    assert not torch.allclose(forward, reverse, atol=0.01)
    assert torch.allclose(gradient((weights * x).sum()), torch.zeros(7).double())  # k1: refused
    assert (weights * kl_penalty(x, "k3")).sum().item() == pytest.approx(kl.item())
    # as a reward, the estimator weighs the gradient of log pi
    as_reward = {
        name: gradient((weights * value.detach() * policy).sum())
        for name, value in (("k1", x), ("k3", kl_penalty(x, "k3")))
    }
    assert torch.allclose(as_reward["k1"], reverse)
    assert torch.allclose(as_reward["k3"], reverse - forward)  # refused


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(folder, "stage=sft", "train.max_steps=12", "optim.lr=3e-3")
    return folder


@pytest.mark.parametrize("average", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_without_a_critic_is_the_hand_made_one(sft, tmp_path, average, estimator):
    """Completion by completion, from token log-probabilities of a forward of its own."""
    config = configure(
        *TINY, *PPO, f"model.path={sft}", f"run_dir={tmp_path}", "stage.advantage=grpo",
        "stage.completions=2", "stage.kl_in=loss", f"stage.kl_estimator={estimator}",
        f"stage.loss_average={average}",
    )  # fmt: skip
    session = Session(config, tmp_path, start_runtime(config.hardware, 0), Progress("off"), [])
    loaded = load_policy_and_data(session)
    stage = config.stage
    actors = ppo_baseline.build_actors(session, loaded, None, stage)
    assert actors.value_head is None
    examples = distinct_prompts(loaded.splits.train)[:4]
    found = rollout.roll_out(session, actors, examples, stage, seed=5)
    torch.manual_seed(1)
    for weight in actors.policy.parameters():  # away from the policy that sampled
        weight.data += 0.02 * torch.randn_like(weight)
    now = rollout.measure(session, actors, found.examples, stage)
    losses, kls, count = [], [], 0
    for example, old, new in zip(found.examples, found.tokens, now, strict=True):
        sizes = [len(ids) for ids in example.response_ids]
        loss, _ = policy_loss(new.logprobs, old.logprobs, old.advantages, stage.clip_range)
        x = new.logprobs - old.reference
        kl = x**2 / 2 if estimator == "k2" else (-x).exp() - 1 + x
        for part, own_kl in zip(loss.split(sizes), kl.split(sizes), strict=True):
            shared = {"tokens": 1, "sequences": len(part), "constant": 6}[average]
            losses.append(float((part + 0.2 * own_kl).sum()) / shared)
            kls.append(0.2 * float(own_kl.sum()) / shared)
            count += len(part)
    row = packing.pack_all(found.examples, range(4), session.token_budget)[0]
    out = ppo_loss(actors, row, found, stage)
    assert out.weight == (count if average == "tokens" else 8)
    assert out.loss_sum.item() == pytest.approx(sum(losses), abs=1e-4)
    assert out.metrics["kl_loss"][0].item() == pytest.approx(sum(kls), abs=1e-4)
    assert "value_loss" not in out.metrics


WITHOUT = ("stage.advantage=rloo", "stage.completions=2", "stage.kl_in=loss",
           "stage.kl_estimator=k2", "train.max_steps=8", "train.save_every_steps=1")  # fmt: skip


def test_a_run_without_a_critic_resumes_as_if_uninterrupted(sft, tmp_path):
    words = (*PPO, *WITHOUT, f"model.path={sft}")
    train(tmp_path / "whole", *words)
    with killed_at(6):
        train(tmp_path / "cut", *words)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints") == [4]
    train(tmp_path / "cut", *words, "resume=true")
    name = "final/model.safetensors"
    assert file_digest(tmp_path / "whole" / name) == file_digest(tmp_path / "cut" / name)
    assert not list(tmp_path.rglob("heads.safetensors"))
    rows = metrics(tmp_path / "whole")
    assert not {n for row in rows for n in row if "value" in n or "explained" in n}
    losses = [row["kl_loss"] for row in rows if "kl_loss" in row]
    assert losses[0] == pytest.approx(0.0, abs=1e-6)  # the policy is the reference
    assert losses[-1] > 1e-6
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "RLOO of" in page
    assert "Explained variance" not in page
    assert "Value loss" not in page
    assert "RLOO" in (tmp_path / "whole" / "final" / "README.md").read_text()


def test_scores_of_a_rollout_are_whitened(sft, tmp_path):
    words = ("stage.whiten_scores=true", "stage.normalize=false", "train.max_steps=4")
    train(tmp_path / "r", *[w for w in PPO if "normalize" not in w], *words, f"model.path={sft}")
    first = next(row for row in metrics(tmp_path / "r") if "score_normalised" in row)
    assert first["score_normalised"] == pytest.approx(0.0, abs=1e-6)
    assert first["score"] > 0.5


def test_the_plan_names_the_estimator(sft, tmp_path):
    words = (*TINY, *PPO, *WITHOUT, f"model.path={sft}", f"run_dir={tmp_path}")
    rows = dict(plan_rows(configure(*words)))
    assert rows["stage"] == "ppo-baseline, advantages by rloo, without a critic"
    assert rows["KL weight"] == "0.2, towards 6 nats, k2 in the loss"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage.advantage=rloo", r"stage\.completions=1: stage\.advantage=rloo compares"),
        ("stage.advantage=grpo", r"stage\.completions=1: .*; set 2 or more$"),
        ("stage.advantage=rloo stage.completions=2 stage.vf_coef=1", r"vf_coef=1\.0: has no effect "
         r"with stage\.advantage=rloo; remove it"),
        ("stage.advantage=grpo stage.completions=2 stage.gamma=0.9", r"gamma=0\.9: has no effect"),
        ("stage.advantage=reinforce++ stage.gae_lambda=0.9", r"gae_lambda=0\.9: has no effect"),
        ("stage.advantage=rloo stage.completions=2 stage.whiten_advantages=false",
         r"whiten_advantages=False: has no effect"),
        ("stage.group_std=false", r"group_std=False: has no effect with stage\.advantage=gae"),
        ("stage.kl_estimator=k3", r"kl_estimator=k3: has a biased gradient in the reward"),
        ("stage.kl_in=loss", r"kl_estimator=k1: has a gradient of mean zero in the loss"),
        ("stage.whiten_scores=true", r"whiten_scores=true: undoes stage\.normalize"),
        ("stage.advantage=rlo", r"advantage=rlo: must be one of gae, rloo, grpo, reinforce\+\+"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_misleads_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        configure(*TINY, *PPO, *words.split())
