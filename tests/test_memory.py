"""Memory that runs out: the same step in smaller micro-batches, and what remembers it."""

import json
import re
import weakref
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.errors import ConfigError, OutOfMemory
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from dpo_cli.session import reference
from dpo_cli.stages import dpo, ppo_baseline, reward, rollout, sft
from dpo_cli.train import loop
from dpo_cli.train.memory import TokenBudget, ran_out, within
from dpo_cli.train.prefetch import Prefetch
from small_runs import metrics, train

LOSSES = {"sft": (sft, "sft_loss"), "dpo": (dpo, "dpo_loss"), "reward": (reward, "rewards"),
          "ppo-baseline": (ppo_baseline, "ppo_loss")}  # fmt: skip
# eps: without it Adam makes whole steps of the rounding of a gradient that is zero, a key bias's.
STEPS = ("optim.lr=1e-3", "optim.warmup_steps=0", "optim.eps=1e-3", "train.sample_prompts=0",
         "train.eval_every_steps=0", "train.max_steps=6")  # fmt: skip
MORE = {
    "sft": (), "dpo": (), "reward": ("stage.normalize_prompts=0",),
    "ppo-baseline": ("stage.rollout_samples=16", "stage.max_new_tokens=6", "stage.eval_prompts=4",
                     "reward_fn=length", "stage.no_eos_score=null", "stage.ppo_epochs=1",
                     "stage.normalize=false"),
}  # fmt: skip
MOST = {"sft": 150, "dpo": 150, "reward": 150, "ppo-baseline": 50}  # tokens
CPU_MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


class Machine:
    """Losses that fail above so many tokens, after their forward; tried: tokens of each."""

    def __init__(self, most, error=torch.OutOfMemoryError, message="CUDA out of memory"):
        self.most, self.error, self.message = most, error, message
        self.tried = []
        self.held = []

    @property
    def failures(self):
        return [tokens for tokens in self.tried if tokens > self.most]

    def breaking(self, function):
        def broken(*args, **kwargs):
            (batch,) = (a for a in args if hasattr(a, "input_ids"))
            assert [ref() for ref in self.held if ref() is not None] == []  # frames are gone
            local = torch.zeros(3)
            self.held.append(weakref.ref(local))
            self.tried.append(batch.input_ids.numel())
            out = function(*args, **kwargs)
            if batch.input_ids.numel() > self.most:
                raise self.error(self.message)
            return out

        return broken

    def install(self, monkeypatch, stage):
        module, name = LOSSES[stage]
        monkeypatch.setattr(module, name, self.breaking(getattr(module, name)))


def words(stage):
    return (f"stage={stage}", *STEPS, *MORE[stage])


def figures(run_dir, name):
    return [row[name] for row in metrics(run_dir) if name in row]


def recorded_gradients(monkeypatch):
    """The summed gradients of every step of the runs that follow."""
    found, real = [], loop.take_step

    def recorded(model, *args):
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return real(model, *args)

    monkeypatch.setattr(loop, "take_step", recorded)
    return found


@pytest.mark.parametrize("stage", sorted(LOSSES))
def test_a_step_is_the_same_in_smaller_micro_batches(stage, tmp_path, monkeypatch):
    found = recorded_gradients(monkeypatch)
    train(tmp_path / "plain", *words(stage), "data.eval_rows=0")
    plain, found[:] = list(found), []
    machine = Machine(MOST[stage])
    machine.install(monkeypatch, stage)
    train(tmp_path / "tight", *words(stage), "data.eval_rows=0")
    assert len(found) == len(plain) == 6
    for mine, theirs in zip(found, plain, strict=True):
        scale = max(float(g.abs().max()) for g in theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)
    for name, weight in weights(tmp_path / "tight").items():
        expected = weights(tmp_path / "plain")[name]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6, msg=name)
    assert 1 <= len(machine.failures) <= 3  # found in the first step, not in every one
    assert figures(tmp_path / "tight", "micro_batch_tokens")[-1] <= MOST[stage]
    assert figures(tmp_path / "plain", "micro_batch_tokens") == []


def weights(run_dir):
    return load_file(run_dir / "final" / "model.safetensors")


def test_the_first_step_is_exact(tmp_path, monkeypatch):
    """Of the same weights: 1e-6 of the largest gradient; with dropout it draws what it would
    have drawn with the lower budget from the start."""
    found = recorded_gradients(monkeypatch)
    common = (*words("sft"), "train.max_steps=1", "data.eval_rows=0")
    train(tmp_path / "plain", *common)
    train(tmp_path / "lower", *common, "model.dropout=0.3", "train.micro_batch_tokens=90")
    Machine(most=150).install(monkeypatch, "sft")
    train(tmp_path / "tight", *common)
    train(tmp_path / "dropout", *common, "model.dropout=0.3", "train.micro_batch_tokens=180")
    plain, lower, tight, dropout = found
    scale = max(float(g.abs().max()) for g in plain)
    for a, b in zip(plain, tight, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * scale)
    assert any(not torch.equal(a, b) for a, b in zip(plain, lower, strict=True))
    used = figures(tmp_path / "dropout", "micro_batch_tokens")[0]
    train(tmp_path / "same", *common, "model.dropout=0.3", f"train.micro_batch_tokens={int(used)}")
    for a, b in zip(found[-1], dropout, strict=True):
        assert torch.equal(a, b)


def test_the_cpus_allocator_is_understood_too(tmp_path, monkeypatch, capsys):
    machine = Machine(100, RuntimeError, CPU_MESSAGE)
    machine.install(monkeypatch, "sft")
    train(tmp_path / "r", *words("sft"), "data.eval_rows=0", "logger.progress=plain")
    assert machine.failures
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(told) == len(machine.failures)
    assert re.fullmatch(r"out of memory with \d+ tokens per row: lowered to \d+", told[0])


def test_other_errors_are_not_swallowed(tmp_path, monkeypatch):
    Machine(100, RuntimeError, "shapes do not match").install(monkeypatch, "sft")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path / "r", *words("sft"), "data.eval_rows=0")


def test_one_example_that_is_too_large_is_an_error(tmp_path, monkeypatch):
    Machine(most=2).install(monkeypatch, "dpo")
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "r", *words("dpo"), "data.eval_rows=0")
    told = str(error.value)
    assert re.match(r"out of memory with a single example of \d+ tokens in a micro-batch: ", told)
    for remedy in ("data.max_length", "hardware.activation_checkpointing=1", "lora=lora"):
        assert remedy in told
    assert "\n" not in told


def among_ranks(monkeypatch):
    """Budgets as those of ranks, which wait for each other and cannot do a step again."""
    real = TokenBudget.__init__
    monkeypatch.setattr(
        TokenBudget, "__init__", lambda self, asked, fixed: real(self, asked, fixed=True)
    )


def test_ranks_leave_half_the_budget_for_the_next_start(tmp_path, monkeypatch):
    among_ranks(monkeypatch)
    machine = Machine(most=100)
    machine.install(monkeypatch, "sft")
    start = (*words("sft"), "data.eval_rows=0", "train.micro_batch_tokens=190")
    with pytest.raises(OutOfMemory, match="190 tokens per row: lowered to 95") as error:
        train(tmp_path / "r", *start)
    assert error.value.run_dir == str(tmp_path / "r")
    del error  # its frames hold the tensors that Machine looks for
    train(tmp_path / "r", *start, "resume=true")
    assert max(machine.tried[-3:]) <= 95
    assert metrics(tmp_path / "r")[-1]["step"] == 6


def test_ranks_remember_a_budget_that_attention_limits(monkeypatch):
    """The limit is known once the model is loaded, after the file was read."""
    budget = TokenBudget(4096, fixed=True)
    budget.restore({"asked": 2048, "tokens": 1024})
    assert budget.tokens == 4096
    budget.limit(2048)
    assert (budget.configured, budget.tokens) == (2048, 1024)


def test_ranks_do_not_start_again_for_what_smaller_rows_cannot_mend(tmp_path, monkeypatch):
    among_ranks(monkeypatch)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(loop, "build_optimizer", full)
    with pytest.raises(ConfigError, match=r"Lower train\.micro_batch_tokens"):
        train(tmp_path / "r", *words("sft"), "data.eval_rows=0")
    assert not (tmp_path / "r" / "micro_batch_tokens.json").exists()


def test_memory_that_runs_out_elsewhere_is_explained(tmp_path, monkeypatch):
    """As where the optimiser makes its state, in the first step."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(loop, "take_step", full)
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "r", *words("sft"), "data.eval_rows=0")
    (told,) = str(error.value).splitlines()
    assert told.startswith("CUDA out of memory. Tried to allocate 9 GiB. Lower ")
    for remedy in ("train.micro_batch_tokens", "lora=qlora", "optim=adamw8bit"):
        assert remedy in told


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "reward")]


@pytest.mark.parametrize("stage", ["dpo", *SLOW])
def test_evaluation_finds_its_room_and_training_keeps_it(stage, tmp_path, monkeypatch):
    train(tmp_path / "plain", *words(stage))
    machine = Machine(most=150)
    machine.install(monkeypatch, stage)
    train(tmp_path / "tight", *words(stage))
    plain, tight = (figures(tmp_path / name, "eval/loss") for name in ("plain", "tight"))
    assert len(tight) == 2  # before and after: the steps between have found no room to lose
    assert tight == pytest.approx(plain, abs=1e-5)
    assert figures(tmp_path / "tight", "micro_batch_tokens")[0] <= 150


def test_the_reference_finds_its_room(tmp_path, monkeypatch):
    common = (*words("dpo"), "train.max_steps=1")
    train(tmp_path / "plain", *common)
    machine = Machine(most=150)
    broken = machine.breaking(lambda batch, model: real(model, batch))
    real = reference.sequence_logprobs
    monkeypatch.setattr(reference, "sequence_logprobs", lambda model, batch: broken(batch, model))
    train(tmp_path / "tight", *common, f"cache_dir={tmp_path / 'cache'}")
    assert machine.failures
    for name in ("loss", "logratios/chosen"):
        assert figures(tmp_path / "tight", name)[0] == pytest.approx(
            figures(tmp_path / "plain", name)[0], abs=1e-5
        )


def test_a_rollouts_log_probabilities_find_their_room(tmp_path, monkeypatch):
    train(tmp_path / "plain", *words("ppo-baseline"))
    machine = Machine(most=150)
    broken = machine.breaking(lambda batch, model: real(model, batch))
    real = rollout.target_states
    monkeypatch.setattr(rollout, "target_states", lambda model, batch: broken(batch, model))
    train(tmp_path / "tight", *words("ppo-baseline"))
    assert machine.failures
    assert figures(tmp_path / "tight", "kl") == pytest.approx(
        figures(tmp_path / "plain", "kl"), abs=1e-4
    )


@pytest.mark.parametrize("stage", ["dpo", "ppo-baseline"])
def test_a_resumed_run_remembers(stage, tmp_path, monkeypatch):
    """Interrupted in the fifth step: bit for bit, and without running out of memory again."""
    common = (*words(stage), "data.eval_rows=0", "train.save_every_steps=2")
    Machine(MOST[stage]).install(monkeypatch, stage)
    train(tmp_path / "whole", *common)
    real = loop._train_step

    def die_at_four(run):
        if run.step == 4:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(loop, "_train_step", die_at_four)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", *common)
    monkeypatch.setattr(loop, "_train_step", real)
    again = Machine(MOST[stage])
    again.install(monkeypatch, stage)
    train(tmp_path / "cut", *common, "resume=true")
    assert again.tried
    assert again.failures == []
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    kept = "micro_batch_tokens"
    assert len(set(figures(tmp_path / "cut", kept))) == 1
    state = json.loads((tmp_path / "cut/checkpoints/step-6/state.json").read_text())[kept]
    assert state == {"asked": 4096, "tokens": figures(tmp_path / "cut", kept)[-1]}


# ---------------------------------------------------------------- the parts


def row(*prompts):
    ids = np.arange(99, dtype=np.int32)
    examples = [EncodedExample(ids[:n], (ids[:1],), i) for i, n in enumerate(prompts)]
    return pack(examples, range(len(examples)))


def test_the_budget_halves_from_what_failed():
    budget, said = TokenBudget(4096), []
    budget.lower(row(30, 10), said.append)  # of 40 tokens: less than the budget allowed
    assert (budget.tokens, budget.lowered) == (20, True)
    budget.lower(None, said.append)
    assert budget.tokens == 10
    assert said == ["out of memory with 40 tokens per row: lowered to 20",
                    "out of memory with 20 tokens per row: lowered to 10"]  # fmt: skip
    with pytest.raises(ConfigError, match="a single example of 7 tokens"):
        budget.lower(row(7), said.append)


def test_what_was_found_counts_for_the_budget_it_was_found_with():
    found = TokenBudget(4096)
    found.lower(None, print)
    same, other, limited = TokenBudget(4096), TokenBudget(8192), TokenBudget(4096)
    limited.limit(1000)
    for budget in (same, other, limited):
        budget.restore(found.state())
    assert [b.tokens for b in (same, other, limited)] == [2048, 8192, 1000]
    assert [b.lowered for b in (same, other, limited)] == [True, False, False]


def test_a_pass_that_never_fits_ends():
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match="a single example in a micro-batch"):
        within(TokenBudget(5), torch.device("cpu"), lambda line: None, work)


def test_the_allocators_own_words():
    """The machine's real message, of a tensor that no machine has room for."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(error.value)
    assert not ran_out(RuntimeError("CUDA error: device-side assert triggered"))


def test_steps_made_ahead_are_made_again_for_a_lower_budget():
    budget, made = TokenBudget(8), []

    def make(step):
        made.append((step, budget.tokens))
        return made[-1]

    with closing(Prefetch(make, 4, version=lambda: budget.tokens)) as ahead:
        assert ahead(0) == (0, 8)
        budget.lower(None, print)
        assert [ahead(0), ahead(1), ahead(2), ahead(3)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert {(1, 4), (3, 4)} <= set(made)
