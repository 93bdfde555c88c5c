"""reward_fn=reward_model against transformers' own forward, and its mean 0 and std 1."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import small_tokenizers
from dpo_cli import durable
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.attention import interface
from dpo_cli.rewards import normalization as normalisation
from dpo_cli.rewards import scoring
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import load_scorer
from scoring_helpers import scorer, session_of, texts
from small_runs import train
from test_scoring import saved

REWARD = ("stage=reward", "optim.lr=1e-2", "train.max_steps=2", "stage.normalize_prompts=6",
          "stage.normalize_max_new_tokens=6")  # fmt: skip


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring") / "sft"
    train(folder, "stage=sft", "train.max_steps=2", "optim.lr=3e-3")
    return folder


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    """A reward model, and the samples on which it was normalised."""
    folder, seen = tmp_path_factory.mktemp("scoring") / "run", []
    real = normalisation._samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalisation, "_samples", lambda *a: seen.append(real(*a)) or seen[-1])
        summary = train(folder, *REWARD, f"model.path={sft}")
    return folder, seen[0], summary


def hf_reward(folder, ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_a_model_trained_by_a_kernel_of_half_precision_is_scored_in_float32(trained, tmp_path):
    """FlashAttention takes no float32: a run in bf16 on CUDA would fail at its end."""
    path = str(trained[0] / "final")
    plain = raw(tmp_path, path)
    rows = texts(" was good.", " was bad and long.", " was", prompt="The film")
    wanted = plain(rows)
    interface.use_kernel(plain.model, "varlen")
    made = scoring.reward_model_scorer(plain.session, plain.model, plain.encoding.tokenizer)
    assert interface.kernel_of(made.model) == "sdpa"
    assert made(rows) == pytest.approx(wanted, abs=1e-5)


def raw(tmp_path, path, *words):
    return scorer(tmp_path, "reward_fn=reward_model", f"reward_fn.path={path}",
                  "reward_fn.normalized=false", *words)  # fmt: skip


def test_a_reward_model_scores_as_transformers_does(trained, tmp_path):
    folder = trained[0] / "final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = tokenizer.eos_token_id
    rows = [Completed("The film", " was good ."), Completed("The film", " was good .", False),
            Completed("The film", ""), Completed("The film", "", False), Completed("", " bad"),
            Completed("I saw it", " twice and it was a very long film and good ."),
            Completed("The film", " was good .")]  # fmt: skip
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    expected = [
        hf_reward(folder, [*(ids(r.prompt) or [eos]), *ids(r.completion), *[eos] * r.finished])
        for r in rows
    ]
    for path in (trained[0], folder):
        got = raw(tmp_path, path)(rows)
        assert got == pytest.approx(expected, abs=1e-5)
    assert got[0] == got[-1]
    assert len({round(x, 4) for x in got}) == len(rows) - 1
    alone = [raw(tmp_path, folder)([row])[0] for row in rows[:3]]
    assert alone == pytest.approx(got[:3], abs=1e-5)


def test_many_completions_of_a_prompt(trained, tmp_path):
    """More than share one copy of it, of ragged lengths, among other prompts."""
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "final")
    rows = [Completed(f"The film {n % 3}", " good" * (n % 20)) for n in range(60)]
    got = raw(tmp_path, trained[0])(rows)
    for n in (0, 19, 20, 41, 59):
        ids = [*tokenizer(rows[n].prompt).input_ids, *tokenizer(rows[n].completion).input_ids]
        expected = hf_reward(trained[0] / "final", [*ids, tokenizer.eos_token_id])
        assert got[n] == pytest.approx(expected, abs=1e-5)


def test_chats_are_scored_as_their_template_writes_them(tmp_path):
    tokenizer = small_tokenizers.chatml()
    shape = GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=1,
                       pad_token_id=290)  # fmt: skip
    torch.manual_seed(1)
    GPT2ForSequenceClassification(shape).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    prompt = [{"role": "user", "content": "the cat?"}]
    chat = [*prompt, {"role": "assistant", "content": "the dog."}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert model.config.pad_token_id == 290  # so its EOS is read
    found = raw(tmp_path, tmp_path / "m")(
        [Completed(prompt, "the dog."), Completed(prompt, "the dog.", False)]
    )
    expected = [hf_reward(tmp_path / "m", ids), hf_reward(tmp_path / "m", ids[:-1])]
    assert found == pytest.approx(expected, abs=1e-5)


def test_rewards_are_normalised_on_samples_of_the_base(trained, sft, tmp_path):
    folder, rows, summary = trained
    facts = json.loads((folder / "final" / "dpo_run.json").read_text())
    assert facts["stage"] == "reward"  # nothing else of it is lost
    assert facts["normalisation"]["samples"] == len(rows) == 6
    assert len({r.prompt for r in rows}) == 6
    values = torch.tensor(raw(tmp_path, folder)(rows), dtype=torch.float64)
    assert values.mean().item() == pytest.approx(facts["normalisation"]["mean"], abs=1e-6)
    normal = torch.tensor(
        scorer(tmp_path, "reward_fn=reward_model", f"reward_fn.path={folder}")(rows)
    )
    assert normal.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert normal.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert summary["reward_mean"] == facts["normalisation"]["mean"]
    assert summary["reward_std"] == facts["normalisation"]["std"]
    assert "normalisation" in (folder / "final" / "dpo_run.json").read_text()
    assert durable.damage(folder / "final") is None


@pytest.mark.parametrize("facts", [{"mean": 0.0, "std": 0.0}, {"mean": "x"}, [], {"std": 1e999}])
def test_facts_that_cannot_scale_a_reward(facts, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "m")
    path = tmp_path / "m" / "final" / "dpo_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalisation": facts}))
    with pytest.raises(DataError, match="has no finite mean and std of rewards"):
        scorer(tmp_path, "reward_fn=reward_model", f"reward_fn.path={tmp_path / 'm'}")


def test_a_run_killed_before_it_normalised_does_so_on_resuming(sft, tmp_path):
    words = (*REWARD, f"model.path={sft}")
    train(tmp_path / "r", *words)
    path = tmp_path / "r" / "final" / "dpo_run.json"
    measured = json.loads(path.read_text())
    shutil.rmtree(tmp_path / "r" / "final")
    train(tmp_path / "r", *words, "resume=true")
    assert json.loads(path.read_text()) == measured


def test_the_base_writes_the_samples_not_the_trained_model(sft, tmp_path, monkeypatch):
    used, real = [], normalisation.complete
    monkeypatch.setattr(
        normalisation, "complete", lambda s, model, *a: used.append(model) or real(s, model, *a)
    )
    train(tmp_path / "r", *REWARD, f"model.path={sft}")
    (model,) = used
    base = GPT2LMHeadModel.from_pretrained(sft / "final")
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize(
    ("start", "why"), [("scratch", "random weights"), ("reward", "a reward model")]
)
def test_what_cannot_write_normalises_nothing(trained, tmp_path, capsys, start, why):
    words = [] if start == "scratch" else [f"model.path={trained[0]}"]
    summary = train(tmp_path / "r", *REWARD, *words, "logger.progress=plain")
    assert f"rewards are not normalized: the run started from {why}" in capsys.readouterr().err
    assert "reward_mean" not in summary
    assert "normalisation" not in json.loads((tmp_path / "r/final/dpo_run.json").read_text())
    session, said = session_of(
        tmp_path, "reward_fn=reward_model", f"reward_fn.path={tmp_path / 'r'}"
    )
    rows = texts(" was good .", prompt="The film")
    assert load_scorer(session)(rows) == raw(tmp_path, tmp_path / "r")(rows)
    assert [line.partition(":")[0] for line in said] == ["reward_fn.normalized=true"]
    assert said[0].endswith("so its rewards are not scaled")


def test_reward_models_that_cannot_be_used(sft, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^reward_fn\.path=\S+: is a GPT2LMHeadModel, which cannot"
    ):
        raw(tmp_path, sft)
    folder, _ = saved("gpt2", tmp_path / "three")
    with pytest.raises(ConfigError, match=r"^reward_fn\.path=\S+: is a classifier with 3 labels"):
        raw(tmp_path, folder)
    with pytest.raises(ConfigError, match=r"^reward_fn\.path=\S+: no config\.json there"):
        raw(tmp_path, Path("tests"))


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_published_folder_is_whole_whenever_its_file_is_replaced(tmp_path, monkeypatch, writes):
    """Killed after so many of the three writes: never refuted by the manifest."""
    durable.publish_folder(tmp_path / "f", lambda at: [
        (at / name).write_text('{"old": 1}') for name in ("a.json", "b.json")
    ])  # fmt: skip
    left, real = iter(range(writes)), durable.write_bytes

    def write_bytes(path, data):
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(durable, "write_bytes", write_bytes)
    ends = contextlib.nullcontext() if writes == 3 else pytest.raises(KeyboardInterrupt)
    with ends:
        durable.replace_json(tmp_path / "f", "a.json", {"new": 1})
    assert durable.damage(tmp_path / "f") is None
    found = json.loads((tmp_path / "f" / "a.json").read_text())
    assert found == ({"new": 1} if writes >= 2 else {"old": 1})
    listed = json.loads((tmp_path / "f" / "MANIFEST.json").read_text())["files"]
    assert ("a.json" in listed) == (writes in (0, 3))
