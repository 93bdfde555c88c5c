"""stage=ppo-baseline: whole runs, resuming at rollouts, and its parts against plain forwards."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dpo_cli import packing
from dpo_cli.durable import file_digest
from dpo_cli.errors import ConfigError, Preempted
from dpo_cli.losses.ppo import AdaptiveKl, FixedKl, Normalizer, policy_loss, value_loss
from dpo_cli.model.attention.interface import attention_as
from dpo_cli.model.sampling import generate
from dpo_cli.records import EncodedExample
from dpo_cli.report.console import Progress
from dpo_cli.rewards.scorers import Completed
from dpo_cli.session.models import load_policy_and_data
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.session import Session
from dpo_cli.stages import ppo_baseline, rollout
from dpo_cli.train import checkpoint, loop
from dpo_cli.train.runtime import start_runtime
from small_runs import TINY, configure, killed_at, metrics, train

PPO = (
    "stage=ppo-baseline", "stage.rollout_samples=16", "train.batch_size=8", "stage.ppo_epochs=2",
    "stage.max_new_tokens=6", "stage.normalize_prompts=8", "stage.eval_prompts=4",
    "optim.lr=1e-3", "stage.no_eos_score=null", "reward_fn=length", "train.max_steps=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(folder, "stage=sft", "train.max_steps=12", "optim.lr=3e-3")
    return folder


@pytest.fixture(scope="module")
def whole(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    summary = train(folder, *PPO, f"model.path={sft}")
    return folder, summary


@pytest.fixture
def actors(sft, tmp_path):
    config = configure(*TINY, *PPO, f"model.path={sft}", f"run_dir={tmp_path}")
    session = Session(config, tmp_path, start_runtime(config.hardware, 0), Progress("off"), [])
    loaded = load_policy_and_data(session)
    made = ppo_baseline.build_actors(session, loaded, None, config.stage)
    examples = distinct_prompts(loaded.splits.train)[:6]
    return session, made, examples, config.stage


def test_a_run_tells_its_rollouts_and_leaves_a_plain_model(whole):
    folder, summary = whole
    rows = [r for r in metrics(folder) if "policy_loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 13))
    # steps of one rollout (2 epochs of 2 minibatches) share its figures
    assert [r["score"] for r in rows[:4]] == [rows[0]["score"]] * 4
    assert rows[4]["score"] != rows[0]["score"]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[0]["entropy_nats"] > rows[0]["rollout/tokens"]  # of a completion, not a token
    assert rows[0]["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert {"rollout/tokens_per_second", "rollout/seconds", "clip_fraction"} <= set(rows[0])
    assert summary["samples"] == 3 * 16
    assert summary["gradient_steps"] == 12
    weights = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    assert not [name for name in weights if "value" in name]
    provenance = json.loads((folder / "final" / "dpo_run.json").read_text())
    assert provenance["stage"] == "ppo-baseline"
    assert provenance["reward_fn"]["name"] == "length"


def test_ppo_learns_what_is_rewarded(sft, tmp_path):
    """Longer texts, without a penalty: the number of words rises well above the reference's."""
    words = (*PPO[:-1], "train.max_steps=120", "stage.kl_coef=0", "stage.kl_control=fixed",
             "stage.rollout_samples=64", "train.batch_size=32", "optim.lr=3e-3",
             "train.eval_every_steps=0", "stage.max_new_tokens=8")  # fmt: skip
    train(tmp_path / "r", *words, f"model.path={sft}", "data.rows=200")
    scores = [r["score"] for r in metrics(tmp_path / "r") if "score" in r]
    assert scores[-1] > scores[0] + 1.0


def test_a_rollout_is_measured_as_the_plain_models_would(actors):
    session, made, examples, stage = actors
    stage = replace(stage, temperature=0.7, completions=2)
    torch.manual_seed(1)
    for weight in made.policy.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    nn.init.normal_(made.value_head.weight)
    found = rollout.roll_out(session, made, examples, stage, seed=5)
    assert [len(e.response_ids) for e in found.examples] == [2] * 6
    for example, tokens in zip(found.examples, found.tokens, strict=True):
        plain = [plain_measures(made, example, ids, 0.7) for ids in example.response_ids]
        columns = zip(*plain, strict=True)
        for name, column in zip(("logprobs", "reference", "values"), columns, strict=True):
            assert torch.allclose(getattr(tokens, name), torch.cat(column), atol=2e-5), name
    ratios = [float((t.logprobs - t.reference).sum()) / 2 for t in found.tokens]
    # the KL of a prompt's two samples together is the mean over all completions
    assert found.figures["kl"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)


def plain_measures(made, example: EncodedExample, response, temperature: float):
    """One sequence, transformers' own forward: log-probs of policy and reference, values."""
    prompt = torch.as_tensor(example.prompt_ids).long()
    ids = torch.cat([prompt, torch.as_tensor(response).long()])[None]
    place = slice(len(prompt) - 1, ids.shape[1] - 1)
    found = []
    with torch.no_grad():
        for model in (made.policy, made.reference.model):
            with attention_as(model, "eager"):
                logits = model(input_ids=ids, use_cache=False).logits[0, place] / temperature
            logprobs = logits.log_softmax(-1)
            found.append(logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1))
        with attention_as(made.policy, "eager"):
            states = made.policy.base_model(input_ids=ids).last_hidden_state[0, place]
        found.append(made.value_head(states).squeeze(1))
    return found


def test_the_loss_is_the_hand_made_one_and_skips_what_ran_away(actors):
    """Token by token, of a rollout whose old log-probabilities were moved by hand."""
    session, made, examples, stage = actors
    found = rollout.roll_out(session, made, examples, stage, seed=5)
    for number, tokens in enumerate(found.tokens):
        tokens.logprobs = tokens.logprobs - (4.0 if number == 0 else 0.1 * number)
        tokens.values = tokens.values + 0.3
    ppo = ppo_baseline.Ppo(session, stage, made, [], [], None, found)  # type: ignore[arg-type]
    row = packing.pack_all(found.examples, range(6), session.token_budget)[0]
    made.policy.train()
    out = ppo_baseline.ppo_loss(made, row, found, stage)
    out.loss_sum.backward()
    wanted, count = 0.0, 0
    for number, (example, tokens) in enumerate(zip(found.examples, found.tokens, strict=True)):
        logprobs, _, values = plain_measures(made, example, example.response_ids[0], 1.0)
        losses, _ = policy_loss(logprobs, tokens.logprobs, tokens.advantages, stage.clip_range)
        critic = value_loss(values, tokens.values, tokens.returns, stage.value_clip_range)
        kept = 0.0 if number == 0 else float(losses.sum())  # e^4 is above the limit of 10
        wanted += kept + stage.vf_coef * float(critic.sum())
        count += len(logprobs)
    assert out.weight == count
    assert out.loss_sum.item() == pytest.approx(wanted, abs=1e-3)
    assert float(out.metrics["skipped"][0]) == len(found.tokens[0].logprobs)
    assert made.value_head.weight.grad is not None
    assert ppo.minibatch == 8


def test_scores_without_eos_are_fixed_and_others_normalised_and_clipped(actors):
    _, made, _, stage = actors
    made.normalizer = Normalizer(2.0, 0.5)
    stage = replace(stage, no_eos_score=-1.0, score_clip=3.0)

    class Sample:
        def __init__(self, finished):
            self.finished = finished

    samples = [Sample(True), Sample(False), Sample(True)]
    scores = rollout.final_scores(made, torch.tensor([3.0, 9.0, 9.0]), samples, stage)
    assert scores.tolist() == [2.0, -1.0, 3.0]


def test_a_negative_kl_is_told(actors, monkeypatch):
    """Samples of another model: the policy finds them less likely than the reference does."""
    session, made, examples, stage = actors
    told = []
    monkeypatch.setattr(Progress, "note", lambda self, line: told.append(line))
    torch.manual_seed(0)
    for weight in made.policy.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    foreign = rollout.draw(session, made, made.reference.model, examples, stage, 3)
    monkeypatch.setattr(rollout, "draw", lambda *rest: foreign)
    found = rollout.roll_out(session, made, examples, stage, seed=5)
    assert found.figures["kl"] < 0
    assert [line for line in told if "below zero" in line]


def test_every_completion_is_learnt_from_once_a_pass(actors):
    session, made, _, stage = actors
    config = replace(session.config, train=replace(session.config.train, batch_size=2))
    session = replace(session, config=config)
    session.kernel = "plain"
    examples = [
        EncodedExample(torch.tensor([1, 2]).numpy(), (torch.tensor([3, n]).numpy(),), n)
        for n in range(8)
    ]
    plan = rollout.plan_steps(8, 8, 1.0, None, True, 0)
    state = rollout.Rollout(examples, [], {})
    ppo = ppo_baseline.Ppo(session, stage, made, examples, [], plan, state)
    assert ppo.steps_per_rollout == 8
    orders = []
    for first in (0, 4):
        seen = [
            i
            for step in range(first, first + 4)
            for row in ppo.batches(step)
            for i in row.example_ids.tolist()
        ]
        assert sorted(seen) == list(range(8))
        orders.append(seen)
    assert orders[0] != orders[1]
    again = [row.example_ids.tolist() for row in ppo.batches(2)]
    assert again == [row.example_ids.tolist() for row in ppo.batches(2)]


@pytest.mark.parametrize("control", ["adaptive", "fixed"])
def test_resumed_equals_uninterrupted_at_a_rollout(sft, tmp_path, control):
    """Killed in the middle of a rollout, the run goes on from the boundary before it."""
    words = [*PPO, f"model.path={sft}", f"stage.kl_control={control}", "train.save_every_steps=1"]
    if control == "adaptive":
        words += ["stage.target_kl=0.5", "stage.kl_horizon=64"]
    train(tmp_path / "whole", *words)
    with killed_at(6):  # two steps into the second rollout
        train(tmp_path / "cut", *words)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints") == [4]
    train(tmp_path / "cut", *words, "resume=true")
    for name in ("final/model.safetensors", "checkpoints/step-12/heads.safetensors"):
        assert file_digest(tmp_path / "whole" / name) == file_digest(tmp_path / "cut" / name)
    logged = [
        [(r["step"], r["score"], r["kl_coef"]) for r in metrics(tmp_path / run) if "kl_coef" in r]
        for run in ("whole", "cut")
    ]
    assert logged[0] == logged[1]


def test_a_signal_waits_for_the_rollouts_end(sft, tmp_path, monkeypatch):
    import os
    import signal

    words = [*PPO, f"model.path={sft}", "train.save_every_steps=0", "train.eval_every_steps=0"]
    real = loop._train_step

    def signalled(run):
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    monkeypatch.setattr(loop, "_train_step", signalled)
    with pytest.raises(Preempted, match="SIGTERM after step 8 of 12"):
        train(tmp_path / "r", *words)
    assert checkpoint.steps_in(tmp_path / "r" / "checkpoints") == [8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_steps=10"], r"train\.max_steps=10: must be a multiple of 4"),
        (["train.batch_size=6"], r"train\.batch_size=6: must divide stage\.rollout_samples=16"),
        (["stage.completions=3"], r"stage\.completions=3: must divide"),
        (["stage.temperature=0"], r"stage\.temperature=0\.0: must be above 0"),
        (["stage.kl_control=fixed", "stage.target_kl=3"], r"has no effect with stage\.kl_control"),
        (["stage.vf_coef=0", "stage.value_lr_scale=3"], r"value_lr_scale=3\.0: has no effect with"),
        (["stage.normalize_prompts=0"], r"normalize_prompts=0: nothing to measure"),
        (["stage.normalize=false"], r"normalize_prompts=8: has no effect with stage\.normalize"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        configure(*TINY, *PPO, *words)


@pytest.mark.parametrize(
    "word", ["train.batch_size=0", "stage.ppo_epochs=0", "stage.completions=0"]
)
def test_a_rollout_of_nothing_is_out_of_bounds(word):
    with pytest.raises(ConfigError, match=r"=0: must be at least 1$"):
        configure(*TINY, *PPO, word)


def test_one_held_out_prompt_has_figures_without_errors(sft, tmp_path):
    words = ["stage.eval_prompts=1", "train.max_steps=4", f"model.path={sft}"]
    train(tmp_path / "r", *PPO, *words)
    figures = [r for r in metrics(tmp_path / "r") if "eval/kl" in r]
    assert len(figures) >= 2
    assert not {"eval/kl_se", "eval/score_se"} & set(figures[0])


def test_the_held_out_loss_is_of_the_scores_that_ppo_maximises(actors):
    """Completions without EOS count as they do in training."""
    session, made, _, stage = actors
    held_out = distinct_prompts(load_policy_and_data(session).splits.eval)[:4]
    stage = replace(stage, no_eos_score=-7.0, max_new_tokens=1)
    samples = rollout.draw(session, made, made.policy, held_out, stage, ppo_baseline.EVAL_SEED)
    assert not any(c.finished for row in samples for c in row)
    ppo = ppo_baseline.Ppo(session, stage, made, [], held_out, None)  # type: ignore[arg-type]
    figures = ppo_baseline.evaluate(ppo)
    assert figures["loss"] == pytest.approx(stage.kl_coef * figures["kl"] + 7.0, abs=1e-5)


def test_held_out_scores_have_the_error_of_their_prompts(actors):
    """A score that the prompt alone decides has no smaller error with more completions of each."""
    session, made, _, stage = actors
    held_out = distinct_prompts(load_policy_and_data(session).splits.eval)[:4]
    value = {e.prompt: float(place) for place, e in enumerate(held_out)}
    made = replace(made, score=lambda rows: [value[row.prompt] for row in rows])
    stage = replace(stage, completions=4, max_new_tokens=2)
    ppo = ppo_baseline.Ppo(session, stage, made, [], held_out, None)  # type: ignore[arg-type]
    figures = ppo_baseline.evaluate(ppo)
    assert figures["score"] == pytest.approx(1.5)
    assert figures["score_se"] == pytest.approx(math.sqrt(5 / 3 / 4))  # variance 5/3 of 0, 1, 2, 3


@pytest.mark.parametrize("most", [2, 0])
def test_memory_that_runs_out_in_sampling_leaves_the_token_budget(actors, monkeypatch, most):
    """As in the loop, which evaluates within the budget of training: only decoding is lowered."""
    session, made, examples, stage = actors
    ppo = ppo_baseline.Ppo(session, stage, made, [], examples[:4], None)  # type: ignore[arg-type]
    plain = generate._decode

    def scarce(model, prompts, options, *rest):
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, prompts, options, *rest)

    monkeypatch.setattr(generate, "_decode", scarce)
    before = session.budget.tokens
    if most:
        session.within_memory(lambda: ppo_baseline.evaluate(ppo))
        assert session.decoding.sequences == most * stage.completions
    else:
        with pytest.raises(ConfigError, match="out of memory while sampling from a single prompt"):
            session.within_memory(lambda: ppo_baseline.evaluate(ppo))
    assert session.budget.tokens == before


def test_a_rollout_in_which_nothing_ended_is_told(actors, monkeypatch):
    session, made, examples, stage = actors
    told = []
    monkeypatch.setattr(Progress, "note", lambda self, line: told.append(line))
    short = replace(stage, max_new_tokens=1)
    rollout.roll_out(session, made, examples, short, seed=5)
    assert not told
    rollout.roll_out(session, made, examples, replace(short, no_eos_score=-1.0), seed=5)
    assert "use stage.no_eos_score=null" in told[0]


def test_the_grammars_reward_is_for_its_reviews():
    with pytest.raises(ConfigError, match=r"rates the reviews of .* use another: classifier, rew"):
        configure("stage=ppo-baseline", "data=hh")


def test_too_few_prompts_for_a_rollout(sft, tmp_path):
    words = [word for word in PPO if not word.startswith("train.max_steps")]
    with pytest.raises(ConfigError, match="distinct prompts are too few"):
        train(tmp_path / "r", *words, f"model.path={sft}", "data.rows=10")


def test_a_tuned_policy_needs_a_named_reference(whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ConfigError, match="is itself a PPO policy"):
        train(tmp_path / "r", *PPO, f"model.path={folder}")
    with pytest.raises(ConfigError, match="is itself a PPO policy"):
        train(tmp_path / "d", "stage=dpo", f"model.path={folder}", "train.max_steps=1")


def test_scorers_see_prompt_completion_and_whether_it_ended(actors):
    session, made, examples, stage = actors
    seen: list[Completed] = []

    def score(rows):
        seen.extend(rows)
        return [0.0] * len(rows)

    made.score = score
    samples = rollout.draw(session, made, made.policy, examples, stage, 1)
    rollout.scores_of(made, examples, samples)
    assert [row.prompt for row in seen] == [example.prompt for example in examples]
    assert [row.finished for row in seen] == [row[0].finished for row in samples]


def test_controllers_are_chosen_by_name(actors):
    session, made, _, _ = actors
    assert isinstance(made.kl, AdaptiveKl)
    loaded = load_policy_and_data(session)
    stage = replace(session.config.stage, kl_control="fixed")
    assert isinstance(ppo_baseline.build_actors(session, loaded, None, stage).kl, FixedKl)
