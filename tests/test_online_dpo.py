"""stage=online-dpo: pairs by hand, the loss by plain forwards, and whole runs on a toy whose every
completion can be enumerated."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import toy_space
from composing import problems
from dpo_cli.config import OnlineDpoConfig
from dpo_cli.durable import file_digest
from dpo_cli.errors import ConfigError, DataError, Preempted
from dpo_cli.evaluation.judge import Decision, Verdict
from dpo_cli.evaluation.labels import Pair
from dpo_cli.losses import LOSSES, RankedLogprobs
from dpo_cli.losses.pairwise import sigmoid_loss
from dpo_cli.report.console import Progress
from dpo_cli.rewards.scorers import Completed
from dpo_cli.run import run
from dpo_cli.session.models import load_policy_and_data
from dpo_cli.session.session import Session
from dpo_cli.stages import online_dpo, rounds
from dpo_cli.stages.pairing import by_judge, compare, comparisons
from dpo_cli.train import checkpoint, loop
from dpo_cli.train.runtime import start_runtime
from judge_server import part, serving
from small_runs import configure, killed_at, metrics

PROMPTS = [f"{x} {y} {z}" for x in "ace" for y in "bd" for z in "abcd"]
REWARD = ("reward_fn=lexicon", "reward_fn.positive=[a]", "reward_fn.negative=[b]")
SHORT = (f"stage.max_new_tokens={toy_space.NEW_TOKENS}",)
QUICK = (
    "stage=online-dpo", "model=custom", "data=jsonl", "data.rejected_field=null",
    "data.eval_rows=6", "hardware=cpu", "logger=none", "logger.progress=off", *REWARD, *SHORT,
    "train.sample_prompts=0", "train.batch_size=4", "train.max_steps=6",
    "optim.lr=1e-3", "optim.warmup_steps=0", "stage.rollout_prompts=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts with one demonstration each, and a policy of five words."""
    folder = tmp_path_factory.mktemp("online")
    rows = [json.dumps({"prompt": p, "chosen": " a"}) for p in PROMPTS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    toy_space.save(folder / "sft", toy_space.model(0), stage="sft")
    return folder


def words(home, *more):
    return [*QUICK, f"model.path={home / 'sft'}", f"data.path={home / 'rows.jsonl'}", *more]


def train(home, folder, *more):
    config = configure(*words(home, *more), f"run_dir={folder}", f"cache_dir={home / 'cache'}")
    return run(config, ["dpo-run", *more])


def online_of(home, folder, *more):
    """A run before its first step."""
    config = configure(*words(home, *more), f"run_dir={folder}", f"cache_dir={home / 'cache'}")
    session = Session(config, folder, start_runtime(config.hardware, 0), Progress("off"), [])
    return online_dpo.prepare(session, load_policy_and_data(session), None)[0]


# ---------------------------------------------------------------- pairs

IDS = [np.array(ids) for ids in ([1, 5], [2, 5], [3, 5], [4, 5])]


def compared(scores, ids=IDS, seed=0, **keys):
    decided = [
        Pair(*((a, b) if scores[a] > scores[b] else (b, a)))
        for a, b in combinations(range(len(scores)), 2)
        if scores[a] != scores[b]
    ]
    return compare(decided, ids, OnlineDpoConfig(**keys), scores, random.Random(seed))


def test_best_against_worst_by_hand():
    found = compared([0.2, 0.9, 0.9, -1.0])
    assert (found.responses, found.pairs) == ([1, 3], [Pair(0, 1)])  # the first of the best


def test_all_pairs_by_hand():
    """Scores .2, .9, .9, -1: of six pairs one ties; best first: 1, 2, 0, 3."""
    found = compared([0.2, 0.9, 0.9, -1.0], pairs="all")
    assert found.responses == [1, 2, 0, 3]
    assert {(p.chosen, p.rejected) for p in found.pairs} == {(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}
    assert not found.is_ranking
    assert compared([3.0, 1.0, 2.0, 0.0], pairs="all").is_ranking


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_ties_make_no_pair(pairs):
    assert compared([0.5] * 4, pairs=pairs) is None
    same = [np.array([1, 5])] * 4  # a scorer that is not a function of the text
    assert compared([1.0, 2.0, 3.0, 4.0], ids=same, pairs=pairs) is None


def test_a_ranked_loss_takes_only_whole_rankings():
    ranked = {"pairs": "all", "loss": "plackett_luce"}
    assert compared([0.2, 0.9, 0.9, -1.0], **ranked) is None
    assert compared([0.2, 0.9, 0.8, -1.0], **ranked).responses == [1, 2, 0, 3]
    assert compared([0.2, 0.9, 0.9, -1.0], loss="plackett_luce") is not None


def test_drawn_labels_follow_bradley_terry():
    """Scores 1 and 0 at temperature 0.5: the first is preferred with sigmoid(2) = 0.881."""
    keys = {"labels": "bradley_terry", "label_temperature": 0.5}
    found = [compared([1.0, 0.0], IDS[:2], seed, **keys) for seed in range(2000)]
    share = sum(one.responses == [0, 1] for one in found) / 2000
    assert share == pytest.approx(1 / (1 + math.exp(-2.0)), abs=0.03)  # 4 standard errors


class Listed:
    """A judge with its verdicts by the two texts."""

    name = "listed"

    def __init__(self, verdicts):
        self.verdicts = verdicts

    def __call__(self, matches, tick):
        return [
            Decision(self.verdicts.get(m.ours.completion + m.theirs.completion, Verdict.TIE), "x")
            for m in matches
        ]


def test_a_judge_ranks_by_wins(tmp_path):
    """a beats b, c beats a, b and d tie, everything else is missing: net wins 0, -1, 1, 0."""
    session = Session(
        configure("stage=sft"),
        tmp_path,
        start_runtime(configure().hardware, 0),
        Progress("off"),
        [],
    )
    rows = [[Completed("p", letter) for letter in "abcd"]]
    verdicts = {"ab": Verdict.WIN, "ac": Verdict.LOSS, "bc": Verdict.ERROR}
    (pairs,), decisions = by_judge(session, Listed(verdicts), rows)
    assert pairs == [Pair(0, 1), Pair(2, 0)]
    assert [d.verdict for d in decisions].count(Verdict.TIE) == 3
    stage = OnlineDpoConfig(by="judge")
    assert compare(pairs, IDS, stage, None, random.Random(0)).responses == [2, 1]
    everything = compare(pairs, IDS, replace(stage, pairs="all"), None, random.Random(0))
    assert everything.responses == [2, 0, 3, 1]
    assert everything.pairs == [Pair(1, 3), Pair(0, 1)]
    silent = Listed(dict.fromkeys(("ab", "ac", "ad", "bc", "bd", "cd"), Verdict.UNASKED))
    with pytest.raises(DataError, match=r"judge listed: no verdict on any of 6 matches"):
        by_judge(session, silent, rows)


def test_some_pairs_of_lists_by_hand():
    """Two lists of three; the loss is the mean over each list's own pairs."""
    policy = torch.tensor([[1.0, 0.5, -1.0], [0.0, 2.0, 3.0]])
    pairs = [torch.tensor([[0, 2]]), torch.tensor([[1, 0], [0, 2]])]
    lists = RankedLogprobs(policy, torch.zeros(2, 3), torch.ones(2, 3), comparisons(pairs, 3))
    assert lists.pairs().policy.tolist() == [[1.0, -1.0], [2.0, 0.0], [0.0, 3.0]]
    losses = lists.mean_of_lists(sigmoid_loss(lists.pairs(), 1.0))
    own = lambda h: math.log1p(math.exp(-h))  # noqa: E731
    assert losses.tolist() == pytest.approx([own(2.0), (own(2.0) + own(-3.0)) / 2], rel=1e-6)


# ---------------------------------------------------------------- a round


def moved(online):
    """The policy after it has learned something."""
    torch.manual_seed(1)
    for weight in online.actors.loaded.model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return online


def logprob(model, example, response, heat=1.0):
    """transformers' own forward of a single sequence."""
    prompt = torch.as_tensor(example.prompt_ids).long()
    ids = torch.cat([prompt, torch.as_tensor(response).long()])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / heat
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
@torch.no_grad()
def test_the_loss_is_dpos_on_the_same_pairs(home, tmp_path, pairs):
    """Of the completions and their scores as the round has them, pair by pair."""
    online = moved(online_of(home, tmp_path, f"stage.pairs={pairs}", "stage.temperature=0.8"))
    figures = online.before_step(0)
    stage, plain = online.actors.stage, AutoModelForCausalLM.from_pretrained(home / "sft")
    policy = AutoModelForCausalLM.from_pretrained(home / "sft")
    policy.load_state_dict(online.actors.loaded.model.state_dict())
    wanted, count = 0.0, 0
    for place, example in enumerate(online.current.examples):
        rewards = [toy_space.mean_valence(ids) for ids in example.response_ids]
        assert rewards == sorted(rewards, reverse=True)
        rho = [
            logprob(policy, example, ids) - logprob(plain, example, ids)
            for ids in example.response_ids
        ]
        ranked = [(a, b) for a, b in combinations(range(len(rho)), 2) if rewards[a] > rewards[b]]
        assert sorted(map(tuple, online.current.pairs[place].tolist())) == ranked
        losses = [math.log1p(math.exp(-stage.beta * (rho[a] - rho[b]))) for a, b in ranked]
        wanted += sum(losses) / len(losses)
        count += 1
    found = [online.loss(batch) for step in (0, 1) for batch in online.batches(step)]
    assert sum(out.weight for out in found) == count
    assert sum(float(out.loss_sum) for out in found) == pytest.approx(wanted, abs=1e-4)
    assert 0.0 <= figures["rollout/tied"] < 1.0
    assert figures["rollout/samples"] == 8 * 4


@torch.no_grad()
def test_kl_score_and_gap_are_those_of_the_samples(home, tmp_path, monkeypatch):
    online = moved(online_of(home, tmp_path, "stage.temperature=0.8", "stage.no_eos_score=-3"))
    drawn = []
    real = rounds.draw
    monkeypatch.setattr(rounds, "draw", lambda *rest: drawn.append(real(*rest)) or drawn[-1])
    figures = online.before_step(0)
    plain = AutoModelForCausalLM.from_pretrained(home / "sft")
    policy = AutoModelForCausalLM.from_pretrained(home / "sft")
    policy.load_state_dict(online.actors.loaded.model.state_dict())
    examples = [online.prompts[i] for i in online.plan.indices(0)]
    flat = [(e, c) for e, row in zip(examples, drawn[0], strict=True) for c in row]
    kl = [logprob(policy, e, c.ids, 0.8) - logprob(plain, e, c.ids, 0.8) for e, c in flat]
    assert figures["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    raw = [toy_space.mean_valence(c.ids) for _, c in flat]
    assert figures["score"] == pytest.approx(sum(raw) / len(raw), abs=1e-6)
    ranked = [r if c.finished else -3.0 for r, (_, c) in zip(raw, flat, strict=True)]
    rows = [ranked[i : i + 4] for i in range(0, len(ranked), 4)]
    gaps = [max(row) - min(row) for row in rows if max(row) > min(row)]
    assert figures["rollout/score_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
    assert figures["rollout/tied"] == pytest.approx(1 - len(gaps) / len(rows))


@pytest.mark.parametrize("loss", ["plackett_luce", "simpo", "aot", "ipo", "dpop"])
def test_every_kind_of_loss_takes_all_pairs(home, tmp_path, loss):
    online = online_of(
        home, tmp_path, f"stage.loss={loss}", "stage.pairs=all", "stage.completions=3"
    )
    assert (online.actors.reference is None) == (not LOSSES[loss].reference)
    figures = online.before_step(0)
    assert ("kl" in figures) == LOSSES[loss].reference
    online.actors.loaded.model.train()
    out = online.loss(next(batch for step in (0, 1) for batch in online.batches(step)))
    out.loss_sum.backward()
    assert math.isfinite(out.loss_sum.item())


def test_every_example_is_learned_from_once_a_pass(home, tmp_path):
    online = online_of(home, tmp_path, "stage.round_epochs=2", "train.max_steps=8")
    online.before_step(0)
    orders = []
    for first in (0, 2):
        seen = [
            place
            for step in (first, first + 1)
            for batch in online.batches(step)
            for place in batch.places
        ]
        assert sorted(seen) == list(range(len(online.current.examples)))
        orders.append(seen)
    assert orders[0] != orders[1]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(home, folder, "logger.report=true")


def test_a_run_tells_its_rounds_and_is_an_online_policy(home, whole, tmp_path):
    folder, summary = whole
    rows = [r for r in metrics(folder) if "loss" in r]
    assert [r["rollout/samples"] for r in rows] == [32, 32, 64, 64, 96, 96]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    parts = ("sampling_seconds", "scoring_seconds", "seconds")
    assert all(rows[0][f"rollout/{name}"] > 0 for name in parts)
    assert (summary["samples"], summary["gradient_steps"]) == (3 * 8 * 4, 6)
    assert {"eval/score", "eval/score_se", "eval/kl", "eval/kl_se", "eval/finished"} <= set(summary)
    expected = 0.1 * summary["eval/kl"] - summary["eval/score"]
    assert summary["eval/loss"] == pytest.approx(expected, abs=1e-6)
    provenance = json.loads((folder / "final" / "dpo_run.json").read_text())
    assert (provenance["stage"], provenance["reference"]) == ("online-dpo", str(home / "sft"))
    assert "Online DPO" in (folder / "report.html").read_text()
    assert (
        "after online Direct Preference Optimization"
        in (folder / "final" / "README.md").read_text()
    )
    with pytest.raises(ConfigError, match="is itself an online DPO policy"):
        train(home, tmp_path / "again", f"model.path={folder}")
    rows_file = home / "rows.jsonl"
    found = run(
        configure(
            "stage=evaluate", f"model.path={folder}", "model=custom", "data=jsonl",
            f"data.path={rows_file}", "data.rejected_field=null", "data.eval_rows=6",
            "hardware=cpu", "logger=none", "logger.progress=off", *REWARD, *SHORT,
            f"run_dir={tmp_path / 'evaluated'}",
        ), [],
    )  # fmt: skip
    assert math.isfinite(found["kl"])
    (point,) = [
        json.loads(line) for line in (tmp_path / "evaluated" / "points.jsonl").open()
    ]  # fmt: skip
    assert (point["method"], point["samples"]) == ("online-dpo", 96)


MOVING = ("stage.reference_every=1", "stage.reference_mix=0.3")


@pytest.mark.parametrize("more", [(), MOVING, ("stage.pairs=all", "stage.labels=bradley_terry")])
def test_resumed_equals_uninterrupted_at_a_round(home, tmp_path, more):
    """Killed within the third round, the run goes on from the boundary before it."""
    more = (*more, "train.save_every_steps=1")
    train(home, tmp_path / "whole", *more)
    with killed_at(5):
        train(home, tmp_path / "cut", *more)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints") == [2, 4]
    train(home, tmp_path / "cut", *more, "resume=true")
    files = ["final/model.safetensors"]
    files += ["checkpoints/step-6/carried.safetensors"] * (MOVING[0] in more)
    for name in files:
        assert file_digest(tmp_path / "whole" / name) == file_digest(tmp_path / "cut" / name)
    logged = [
        [(r["step"], r["score"], r["kl"]) for r in metrics(tmp_path / folder) if "loss" in r]
        for folder in ("whole", "cut")
    ]
    assert logged[0] == logged[1]


def test_a_signal_waits_for_the_rounds_end(home, tmp_path, monkeypatch):
    import os
    import signal

    real = loop._train_step

    def signalled(fit):
        if fit.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(fit)

    monkeypatch.setattr(loop, "_train_step", signalled)
    with pytest.raises(Preempted, match="SIGTERM after step 4 of 6"):
        train(home, tmp_path / "r", "train.save_every_steps=0")


@torch.no_grad()
def test_a_reference_follows_as_tr_dpo_says(home):
    """alpha pi + (1 - alpha) ref, weight by weight; alpha 1 is the policy itself."""
    old, policy = toy_space.model(1), toy_space.model(2)
    expected = [
        0.3 * new + 0.7 * was
        for new, was in zip(policy.parameters(), old.parameters(), strict=True)
    ]
    online_dpo.follow(old, policy, 0.3)
    for found, wanted in zip(old.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    online_dpo.follow(old, policy, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(old.parameters(), policy.parameters(), strict=True)
    )


def test_with_the_last_rounds_policy_as_reference_each_round_starts_at_ln_2(home, tmp_path):
    train(home, tmp_path / "r", "stage.reference_every=1", "optim.lr=1e-2")
    losses = [r["loss"] for r in metrics(tmp_path / "r") if "loss" in r]
    assert losses[::2] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-4)


def test_a_round_of_ties_takes_no_step(home, tmp_path):
    """A reward that is always 0: the weights stay, every step is counted."""
    summary = train(home, tmp_path / "r", "reward_fn.positive=[z]", "reward_fn.negative=[]")
    assert summary["rollout/tied"] == 1.0
    assert [r["step"] for r in metrics(tmp_path / "r") if "rollout/tied" in r] == [*range(1, 7)]
    start = AutoModelForCausalLM.from_pretrained(home / "sft").state_dict()
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "final").state_dict()
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_it_approaches_the_optimum_of_every_completion(home, tmp_path):
    """Bradley-Terry labels at temperature t: the optimum is pi_ref exp(r / (t beta)) / Z, which
    maximizes E[r] / t - beta KL. The held-out score rises beyond its interval."""
    beta, heat = 0.5, 0.25
    summary = train(
        home, tmp_path / "r", "stage.labels=bradley_terry", f"stage.label_temperature={heat}",
        f"stage.beta={beta}", "stage.pairs=all", "stage.rollout_prompts=16", "train.batch_size=16",
        "train.max_steps=100", "optim.lr=1e-2", "optim.schedule=linear",
        "train.eval_every_steps=0",
    )  # fmt: skip
    gain = summary["eval/score"] - summary["first/eval/score"]
    assert gain > 4 * summary["eval/score_se"]
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (home / "sft", tmp_path / "r/final")]
    encode, parts = toy_space.tokenizer(), []
    for prompt in PROMPTS:
        before, after = (
            toy_space.enumerate_space(m, encode(prompt)["input_ids"], toy_space.mean_valence)
            for m in models
        )
        value = after.p @ after.rewards / heat - beta * after.p @ (after.logp - before.logp)
        best = beta * math.log(before.p @ np.exp(before.rewards / (heat * beta)))
        parts.append((before.p @ before.rewards / heat, value, best))
    start, reached, best = np.mean(parts, axis=0)
    assert reached > start + 0.7 * (best - start)


# ---------------------------------------------------------------- judges

JUDGED = ("stage.by=judge", "judge=http", "judge.model=m", "stage.completions=3",
          "train.max_steps=2", "judge.both_orders=false")  # fmt: skip


def without_reward(home):
    return [word for word in words(home) if not word.startswith("reward_fn")]


def test_a_model_behind_a_server_labels_the_pairs(home, tmp_path, monkeypatch):
    """It prefers whatever has the more a's; a second run has the same pairs."""

    def prefers_a(request):
        a, b = (part(request.text, letter).count("a") for letter in "AB")
        request.say("More helpful: " + ("A" if a > b else "B" if b > a else "neither"))

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    more = (*JUDGED, "judge.retries=0", "stage.pairs=all")
    with serving(prefers_a) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        config = [*without_reward(home), *more, f"cache_dir={tmp_path / 'cache'}"]
        run(configure(*config, f"run_dir={tmp_path / 'one'}"), [])
        asked = server.calls
        run(configure(*config, f"run_dir={tmp_path / 'two'}"), [])
    assert asked > 0
    (row, _) = [r for r in metrics(tmp_path / "one") if "loss" in r]
    assert 0 < row["rollout/decided"] < 1
    assert not {"score", "rollout/score_gap", "eval/score"} & set(row)
    digests = {file_digest(tmp_path / f"{n}/final/model.safetensors") for n in ("one", "two")}
    assert len(digests) == 1
    provenance = json.loads((tmp_path / "one" / "final" / "dpo_run.json").read_text())
    assert provenance["judge"]["model"] == "m"


def test_calls_of_the_run_must_be_affordable(home, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    config = [*without_reward(home), *JUDGED, "judge.max_calls=23", f"run_dir={tmp_path / 'r'}"]
    with pytest.raises(ConfigError, match=r"judge\.max_calls=23: the run asks up to 24 questions"):
        run(configure(*config), [])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stage.rollout_prompts=6"], r"=6: must be a multiple of train\.batch_size=4"),
        (["train.max_steps=5"], r"train\.max_steps=5: must be a multiple of 2, the steps of a r"),
        (["stage.completions=1"], r"stage\.completions=1: must be at least 2"),
        (["stage.temperature=0"], r"stage\.temperature=0\.0: must be at least"),
        (["stage.label_temperature=2"], r"has no effect with stage\.labels=determ"),
        (["stage.reference_mix=0.5"], r"has no effect with stage\.reference_every=null"),
        (["stage.reference_every=1", "lora=lora"], r"is not offered with lora=lora"),
        (["stage.reference_every=1", "hardware.devices=2"], r"not offered with several devices"),
        (["stage.loss=simpo", "stage.reference_every=2"], r"no effect with stage\.loss=simpo"),
        (["stage.by=judge"], r"judge=reward_fn: compares by the reward"),
        (["stage.by=judge", "stage.no_eos_score=1"], r"no_eos_score=1\.0: has no effect with"),
        (["stage.by=judge", "judge=http"], r"judge=http: needs an endpoint"),
        (["stage.loss=plackett_luce", "stage.pairs=all", "stage.labels=bradley_terry"],
         r"plackett_luce needs a ranking"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(home, monkeypatch, more, message):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        configure(*words(home, *more))


def test_what_is_typed_for_the_other_way_of_ranking_is_refused():
    common = ["stage=online-dpo", "model=tiny", "data=sentiment"]
    assert "judge=http: has no effect with stage.by=reward_fn; remove it" in "\n".join(
        problems([*common, "judge=http"], ["judge=http"])
    )
    (line,) = problems([*common, "reward_fn=none"])
    assert line.startswith("reward_fn=none: stage=online-dpo needs a reward")


def test_too_few_prompts_for_a_round(home, tmp_path):
    more = [word for word in words(home) if not word.startswith("train.max_steps")]
    with pytest.raises(ConfigError, match=r"rollout_prompts=32: 18 distinct prompts are too few"):
        run(configure(*more, "stage.rollout_prompts=32", f"run_dir={tmp_path / 'r'}"), [])


def test_another_shape_cannot_follow(home, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    toy_space.save(tmp_path / "other", small)
    more = ("stage.reference_every=1", f"stage.reference={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match="has other weights than the policy"):
        train(home, tmp_path / "r", *more)
