"""An evaluation and DPO itself, where every completion can be enumerated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import toy_space
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation.frontier import best_of_kl_bound
from dpo_cli.losses import RankedLogprobs
from dpo_cli.losses.pairwise import sigmoid_loss
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.forward import loss_and_logprobs, sequence_logprobs
from dpo_cli.packing import pack
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.records import EncodedExample
from dpo_cli.run import run
from small_runs import configure
from toy_space import NEW_TOKENS, Space

PROMPTS = [f"{x} {y} {z}" for x in "ace" for y in "bd" for z in "abcd"]
SAMPLES, REFERENCE_SAMPLES = 200, 512
BEST_OF = (1, 4, 16)


def evaluate(folder, rows, *overrides):
    config = configure(
        "stage=evaluate", "model=custom", "data=jsonl", f"data.path={rows}", "hardware=cpu",
        f"data.eval_path={rows}", "data.rejected_field=null", "reward_fn=lexicon",
        "reward_fn.positive=[a]", "reward_fn.negative=[b]", f"stage.completions={SAMPLES}",
        f"stage.max_new_tokens={NEW_TOKENS}", "stage.batch_size=600", "logger.progress=off",
        f"run_dir={folder}", *overrides,
    )  # fmt: skip
    return run(config, ["dpo-run", *overrides])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A sweep of two policies, one with a checkpoint, beside their reference: all evaluated."""
    home = tmp_path_factory.mktemp("toy")
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "chosen": " a"}) + "\n" for p in PROMPTS))
    models = {"ref": toy_space.model(0)}
    reference = toy_space.save(home / "ref", models["ref"], stage="sft")
    sweep = home / "sweep"
    (sweep / "jobs").mkdir(parents=True)
    for job, beta in enumerate((0.1, 0.5)):
        folder = sweep / str(job)
        overrides = {"stage": "dpo", "stage.beta": str(beta), "seed": "3"}
        record = {"job": job, "overrides": overrides, "exit_code": 0, "run_dir": "/moved"}
        (sweep / "jobs" / f"{job}.json").write_text(json.dumps(record))
        models[str(job)] = toy_space.model(0, perturbed=0.12 / (1 + job))
        facts = {"stage": "dpo", "loss": "sigmoid", "reference": str(reference)}
        toy_space.save(folder / "final", models[str(job)], **facts)
        (folder / "config.yaml").write_text("seed: 3\n")
        (folder / "metrics.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
        (folder / "summary.json").write_text('{"samples": 640}')
    models["step-5"] = toy_space.model(0, perturbed=0.03)
    toy_space.save(sweep / "0" / "checkpoints" / "step-5", models["step-5"], **facts)
    toy_space.save(sweep / "0" / "checkpoints" / "step-20", models["0"], **facts)
    figures = evaluate(
        home / "eval", rows, f"stage.policies=[{sweep}]", "stage.checkpoints=true",
        f"stage.reference_samples={REFERENCE_SAMPLES}", f"stage.best_of={[*BEST_OF, 1000]}",
    )  # fmt: skip
    spaces = {name: spaces_of(built) for name, built in models.items()}
    return {
        "home": home, "rows": rows, "spaces": spaces, "figures": figures,
        "points": lines(home / "eval" / "points.jsonl"),
    }  # fmt: skip


def spaces_of(built) -> list[Space]:
    encode = toy_space.tokenizer()
    return [
        toy_space.enumerate_space(built, encode(p)["input_ids"], toy_space.mean_valence)
        for p in PROMPTS
    ]


def policies(toy):
    """name -> its row."""
    names = {"sweep/0/checkpoints/step-5": "step-5", "sweep/0": "0", "sweep/1": "1"}
    rows = [row for row in toy["points"] if row["method"] == "dpo"]
    return {names[str(row["policy"]).removeprefix(f"{toy['home']}/")]: row for row in rows}


def exact_kl(policy: list[Space], reference: list[Space]) -> float:
    return float(np.mean([
        (s.p * (s.logp - r.logp)).sum() for s, r in zip(policy, reference, strict=True)
    ]))  # fmt: skip


def exact_optimum(reference: list[Space], beta: float) -> tuple[float, float]:
    """(KL, reward) of pi_ref exp(r / beta) / Z, summed over every completion."""
    kls, rewards = [], []
    for space in reference:
        q = space.p * np.exp((space.rewards - space.rewards.max()) / beta)
        q /= q.sum()
        kls.append((q * np.log(q / space.p)).sum())
        rewards.append((q * space.rewards).sum())
    return float(np.mean(kls)), float(np.mean(rewards))


def test_the_space_is_whole(toy):
    space = toy["spaces"]["ref"][0]
    assert len(space.completions) == 1 + 6 + 6 * 6 * 7
    for spaces in toy["spaces"].values():
        assert [s.p.sum() for s in spaces] == pytest.approx([1.0] * len(PROMPTS))


def test_reward_and_both_kl_estimates_are_the_enumerated_ones(toy):
    reference = toy["spaces"]["ref"]
    for name, row in policies(toy).items():
        spaces = toy["spaces"][name]
        reward = float(np.mean([(s.p * s.rewards).sum() for s in spaces]))
        kl = exact_kl(spaces, reference)
        assert kl > 0.02
        assert row["reward"] == pytest.approx(reward, abs=4 * row["reward_se"])
        assert row["kl"] == pytest.approx(kl, abs=4 * row["kl_se"])
        assert row["kl_sampled"] == pytest.approx(kl, abs=4 * row["kl_sampled_se"])
        # Tighter: of these very prompts, only the sampling within them is at random.
        variance = [(s.p * s.rewards**2).sum() - (s.p * s.rewards).sum() ** 2 for s in spaces]
        error = math.sqrt(np.mean(variance) / SAMPLES / len(PROMPTS))
        assert error < row["reward_se"]
        assert row["reward"] == pytest.approx(reward, abs=4 * error)
        ratios = [s.logp - r.logp for s, r in zip(spaces, reference, strict=True)]
        spread = [
            (s.p * x**2).sum() - (s.p * x).sum() ** 2 for s, x in zip(spaces, ratios, strict=True)
        ]
        error = math.sqrt(np.mean(spread) / SAMPLES / len(PROMPTS))
        assert row["kl_sampled"] == pytest.approx(kl, abs=4 * error)
        assert row["kl"] == pytest.approx(kl, abs=4 * error)  # it varies less


def test_the_optimum_is_the_enumerated_one(toy):
    rows = [row for row in toy["points"] if row["method"] == "optimum"]
    assert len(rows) > 10
    assert rows[-1]["kl"] > 1.0
    for row in rows:
        beta = float(row["setting"].removeprefix("beta="))
        kl, reward = exact_optimum(toy["spaces"]["ref"], beta)
        assert row["kl"] == pytest.approx(kl, abs=4 * row["kl_se"] + 1e-3)  # beta: 4 digits
        assert row["reward"] == pytest.approx(reward, abs=4 * row["reward_se"])
        assert row["reward"] == pytest.approx(reward, abs=0.02)


def test_the_shortfall_is_the_enumerated_one(toy):
    reference = toy["spaces"]["ref"]
    curve = np.array([exact_optimum(reference, beta) for beta in np.geomspace(100, 0.01, 400)])
    for name, row in policies(toy).items():
        spaces = toy["spaces"][name]
        best = np.interp(exact_kl(spaces, reference), *curve.T)
        exact = best - np.mean([(s.p * s.rewards).sum() for s in spaces])
        assert exact > 0
        assert not row["beyond_optimum"]
        assert row["shortfall"] == pytest.approx(exact, abs=4 * row["shortfall_se"])
        assert row["shortfall"] == row["optimum_reward_at_kl"] - row["reward"]


def test_best_of_n_is_the_enumerated_one(toy):
    rows = {row["setting"]: row for row in toy["points"] if row["method"] == "best-of-n"}
    assert list(rows) == [f"n={n}" for n in BEST_OF]  # 1000 are more than were sampled
    for n in BEST_OF:
        exact, kls = [], []
        for space in toy["spaces"]["ref"]:
            q = toy_space.best_of_probabilities(space.p, space.rewards, n)
            exact.append(q @ space.rewards)
            kls.append((q[q > 0] * np.log(q[q > 0] / space.p[q > 0])).sum())
        row = rows[f"n={n}"]
        assert row["reward"] == pytest.approx(np.mean(exact), abs=4 * row["reward_se"])
        assert row["reward"] == pytest.approx(np.mean(exact), abs=0.03)
        assert row["kl"] == best_of_kl_bound(n)
        assert max(kls) <= row["kl"] + 1e-9
    assert rows["n=1"]["kl"] == 0.0


def test_rows_say_what_was_measured(toy):
    found = policies(toy)
    assert list(found) == ["step-5", "0", "1"]  # step-20 is the run's end: once
    assert [row["setting"] for row in found.values()] == ["beta=0.1", "beta=0.1", "beta=0.5"]
    assert [row["step"] for row in found.values()] == [5, 20, 20]
    assert {row["seed"] for row in found.values()} == {3}
    assert [row["gradient_steps"] for row in found.values()] == [5, 20, 20]
    assert [row["samples"] for row in found.values()] == [160, 640, 640]
    best = max(found.values(), key=lambda row: row["reward"])
    assert toy["figures"]["policies"] == 3
    assert toy["figures"]["best_reward"] == best["reward"]
    samples = lines(toy["home"] / "eval" / "samples.jsonl")
    last = [row for row in samples if row["policy"] == found["1"]["policy"]]
    assert len(samples) == 8 + 8 + len(last)
    assert np.mean([row["reward"] for row in last]) == pytest.approx(found["1"]["reward"])


def test_an_earlier_optimum_serves_the_same_prompts_only(toy):
    home, rows = toy["home"], toy["rows"]
    policy, optimum = f"stage.policies=[{home}/sweep/1]", f"stage.optimum={home}/eval"
    figures = evaluate(home / "again", rows, policy, optimum)
    before = policies(toy)["1"]
    for name in ("reward", "kl", "optimum_reward_at_kl", "shortfall", "shortfall_se"):
        assert figures[name] == pytest.approx(before[name], rel=1e-6)
    with pytest.raises(
        ConfigError, match=r"optimum=.*evaluation: its prompts differ \(data, seed or"
    ):
        evaluate(home / "fewer", rows, policy, optimum, "stage.prompts=4")
    with pytest.raises(ConfigError, match=r"evaluation: its reward_fn differs$"):
        evaluate(home / "other", rows, policy, optimum, "reward_fn.positive=[c]")
    with pytest.raises(ConfigError, match=r"stage.optimum=.*has no optimum.json"):
        evaluate(home / "none", rows, policy, f"stage.optimum={home}/again")


def test_a_policy_with_another_tokenizer_is_refused(toy):
    home = toy["home"]
    other = toy_space.save(home / "other-words", toy_space.model(1))
    words = toy_space.tokenizer()
    words.add_tokens(["f"])
    words.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"^stage.policies=.*other-words: its tokenizer differs"):
        evaluate(home / "two", toy["rows"], f"stage.policies=[{home}/sweep/1,{other}]")


def test_an_optimum_needs_a_reference(toy):
    policy = f"model.path={toy['home']}/ref"
    with pytest.raises(ConfigError, match=r"stage.reference=null: the optimum needs a refer"):
        evaluate(toy["home"] / "bare", toy["rows"], policy, "stage.reference_samples=16")


def test_the_plan_of_several_policies(toy):
    sweep = toy["home"] / "sweep"
    config = configure(
        "stage=evaluate", f"stage.policies=[{sweep}]", "model=custom", "data=jsonl",
        f"data.path={toy['rows']}", f"data.eval_path={toy['rows']}", "data.rejected_field=null",
        "reward_fn=length", "hardware=cpu", "stage.checkpoints=true",
    )  # fmt: skip
    rows = dict(plan_rows(config))
    assert rows["policies"] == "3, the first of them:"
    assert str(rows["policy"]).startswith(f"{sweep}/0/checkpoints/step-5, ")
    drawn = configure("stage=frontier", f"stage.evaluations=[{toy['home']}/eval]")
    assert [name for name, _ in plan_rows(drawn)] == ["stage", "evaluations", "", "writes"]


def pairs_of(count: int) -> torch.Tensor:
    """Every ordered pair of different completions, (pairs, 2): preferred, other."""
    return torch.cartesian_prod(torch.arange(count), torch.arange(count)).view(-1, 2)[
        torch.arange(count * count) % (count + 1) != 0
    ]


def bradley_terry_weights(reference: torch.Tensor, rewards: torch.Tensor, k: float):
    """pairs and p_ref(a) p_ref(b) sigmoid(k (r_a - r_b)): all labels there could be."""
    pairs = pairs_of(len(rewards))
    p = reference.exp()
    labels = torch.sigmoid(k * (rewards[pairs[:, 0]] - rewards[pairs[:, 1]]))
    weights = p[pairs[:, 0]] * p[pairs[:, 1]] * labels
    return pairs, weights / weights.sum()


def expected_policy(reference: torch.Tensor, rewards: torch.Tensor, slope: float) -> torch.Tensor:
    return (reference + slope * rewards).softmax(0)


def minimise(parameters, closure_loss, steps):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-15,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = closure_loss()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize(("k", "beta"), [(1.0, 0.5), (2.0, 1.0), (1.0, 2.0)])
def test_dpo_converges_to_the_tilted_reference(toy, k, beta, capsys):
    """With Bradley-Terry labels sigma(k dr) the optimum is pi_ref exp(k r / beta) / Z."""
    space = toy["spaces"]["ref"][0]
    reference, rewards = torch.tensor(space.logp), torch.tensor(space.rewards)
    pairs, weights = bradley_terry_weights(reference, rewards, k)
    logits = reference.clone().requires_grad_()

    def loss():
        logp = logits.log_softmax(0)
        ranked = RankedLogprobs(logp[pairs], reference[pairs], torch.ones(pairs.shape))
        return (weights * sigmoid_loss(ranked, beta=beta)).sum()

    minimise([logits], loss, 400)
    wanted = expected_policy(reference, rewards, k / beta)
    distance = 0.5 * float((logits.detach().softmax(0) - wanted).abs().sum())
    moved = 0.5 * float((reference.exp() - wanted).abs().sum())
    with capsys.disabled():
        print(f"\nDPO, k={k:g} beta={beta:g}: total variation {distance:.1e} (from {moved:.2f})")
    assert moved > 0.05
    assert distance < 0.01


def test_a_transformer_trained_with_dpo_converges_to_it_too(toy, capsys):
    """Through packed rows and the fused head, all weights trained."""
    built = toy_space.model(0).double()
    choose_attention(built, "auto")
    space = toy["spaces"]["ref"][0]
    prompt = np.array(toy_space.tokenizer()(PROMPTS[0])["input_ids"], dtype=np.int32)
    short = [i for i, c in enumerate(space.completions) if len(c) < NEW_TOKENS]
    responses = tuple(np.array(space.completions[i], dtype=np.int32) for i in short)
    # Given that a completion has at most two tokens: pairs of these leave its probability free.
    batch = pack([EncodedExample(prompt, responses, 0)], [0])
    rewards = torch.tensor(space.rewards[short])
    reference = sequence_logprobs(built, batch)
    assert reference.numpy() == pytest.approx(space.logp[short], abs=1e-6)
    conditional = reference.log_softmax(0)
    pairs, weights = bradley_terry_weights(conditional, rewards, k=1.0)
    ends = batch.sequence_lengths.cumsum(0)
    first = ends - batch.sequence_lengths

    def loss():
        def of_tokens(logprobs, examples):
            sums = torch.stack([logprobs[a:b].sum() for a, b in zip(first, ends, strict=True)])
            lengths = torch.ones(pairs.shape)
            ranked = RankedLogprobs(sums[pairs], reference[pairs], lengths)
            return (weights * sigmoid_loss(ranked, beta=0.5)).sum()

        return loss_and_logprobs(built, batch, of_tokens)[0]

    minimise(list(built.parameters()), loss, 300)
    got = sequence_logprobs(built, batch).softmax(0)
    wanted = expected_policy(conditional, rewards, 1.0 / 0.5)
    distance = 0.5 * float((got - wanted).abs().sum())
    moved = 0.5 * float((conditional.exp() - wanted).abs().sum())
    with capsys.disabled():
        print(f"\nDPO, a transformer: total variation {distance:.1e} (from {moved:.2f})")
    assert moved > 0.1
    assert distance < 0.01
