"""stage=reward against plain transformers, and numbers worked by hand."""

import contextlib
import io
import json
import math
import re
import shutil

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import small_tokenizers
from dpo_cli.data.dataset import load_splits
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.run import run
from small_runs import TINY, configure, metrics, train

QUICK = ("stage=reward", "optim.lr=1e-3", "train.max_steps=2", "stage.normalize_prompts=0")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "sft"
    train(folder, "stage=sft", "train.max_steps=4", "optim.lr=3e-3")
    return folder


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    train(folder, *QUICK, f"model.path={sft}")
    return folder


def first(run_dir, name):
    return next(row[name] for row in metrics(run_dir) if name in row)


def last(run_dir, name):
    return [row[name] for row in metrics(run_dir) if name in row][-1]


def plain(folder, *words):
    """(rows, K) rewards of the held-out texts by plain transformers, and the rows' scores."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    config = configure(*TINY, "stage=reward", *words)
    rows = load_splits(config.data, config.seed).eval
    texts = [e.prompt + r + tokenizer.eos_token for e in rows for r in e.responses]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        values = model(**inputs).logits.view(len(rows), -1)
    return values, torch.tensor([e.scores for e in rows], dtype=torch.float32)


@pytest.mark.parametrize(
    "words",
    [(), ("stage.label_smoothing=0.2",), ("stage.margins=true",),
     ("stage.center_coefficient=0.1",), ("data.responses=3",)],
)  # fmt: skip
def test_plain_transformers_finds_the_same_held_out_figures(sft, tmp_path, words):
    train(tmp_path / "r", *QUICK, f"model.path={sft}", *words)
    values, scores = plain(tmp_path / "r", *words)
    chosen, rejected = values[:, 0], values[:, -1]
    options = {word.partition("=")[0] for word in words}
    z = chosen - rejected - ((scores[:, 0] - scores[:, 1]) if "stage.margins" in options else 0.0)
    loss = -logsigmoid(z)
    if "stage.label_smoothing" in options:
        loss = 0.8 * loss - 0.2 * logsigmoid(-z)
    if "stage.center_coefficient" in options:
        loss = loss + 0.1 * (chosen + rejected) ** 2
    if "data.responses" in options:
        loss = values.logsumexp(1) - chosen + values[:, 1:].logsumexp(1) - values[:, 1]
    expected = {
        "loss": loss.mean(), "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert last(tmp_path / "r", f"eval/{name}") == pytest.approx(float(value), abs=1e-5), name
    assert not (tmp_path / "r" / "samples.jsonl").exists()


def test_the_same_without_a_padding_token_of_its_own(sft, tmp_path):
    """As GPT-2: padding is EOS, so the token before it is read, on both sides."""
    shutil.copytree(sft / "final", tmp_path / "policy")
    path = tmp_path / "policy" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["pad_token"] = settings["eos_token"]
    path.write_text(json.dumps(settings))
    tokens = json.loads((tmp_path / "policy" / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["content"] = token["content"].replace("<|pad|>", "<|unused|>")
    vocab = tokens["model"]["vocab"]
    vocab["<|unused|>"] = vocab.pop("<|pad|>")
    (tmp_path / "policy" / "tokenizer.json").write_text(json.dumps(tokens))
    train(tmp_path / "r", *QUICK, f"model.path={tmp_path / 'policy'}")
    values, _ = plain(tmp_path / "r")
    assert AutoTokenizer.from_pretrained(tmp_path / "r" / "final").pad_token == "<|endoftext|>"
    found = last(tmp_path / "r", "eval/rewards/chosen")
    assert found == pytest.approx(float(values[:, 0].mean()), abs=1e-5)


def test_a_reward_model_goes_on_where_it_ended(trained, tmp_path):
    train(tmp_path / "more", *QUICK, f"model.path={trained}", "seed=5", "data.eval_rows=12")
    again = first(tmp_path / "more", "eval/loss")
    train(tmp_path / "other", *QUICK, "seed=5")
    fresh = first(tmp_path / "other", "eval/loss")
    values = plain(trained, "seed=5")[0]
    assert again == pytest.approx(-logsigmoid(values[:, 0] - values[:, 1]).mean().item(), abs=1e-5)
    assert abs(fresh - again) > 1e-3


LEARN = ("stage=reward", "optim.schedule=linear", "model.architecture.layers=1",
         "train.eval_every_steps=0", "data.eval_rows=100")  # fmt: skip


def test_learns_the_embedded_pairs(tmp_path):
    found = train(tmp_path / "r", *LEARN, "data.rows=640", "train.batch_size=64",
                  "train.epochs=8", "optim.lr=4e-3")  # fmt: skip
    assert found["rewards/accuracies"] > 0.9
    assert found["eval/rewards/accuracies"] > 0.65  # near ties are many, and the rows few
    assert found["eval/rewards/margins"] > 1.0


def test_learns_to_tell_the_best_of_four_from_the_worst(tmp_path):
    found = train(tmp_path / "r", *LEARN, "data.responses=4", "data.rows=1000",
                  "train.batch_size=32", "train.epochs=4", "optim.lr=5e-3")  # fmt: skip
    assert found["eval/rewards/accuracies"] > 0.9
    assert found["eval/loss"] < math.log(24) - 0.5  # chance: all 24 orders alike
    assert found["lists_per_second"] > 0


def test_margins_come_from_data_with_scores(sft, tmp_path):
    rows = [{"prompt": f"The film {i}", "chosen": " was good.", "rejected": f" was bad {i}."}
            for i in range(24)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"

    def go(name, *words):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_jsonl(tmp_path / name, f"model.path={sft}", f"data.path={path}",
                  "stage.margins=true", *words)  # fmt: skip

    with pytest.raises(DataError, match=r"^stage\.margins=true: row 0 has no scores: .*scores_fie"):
        go("a")
    rows = [{**row, "scores": [2.0, 1.0]} for row in rows]
    go("b", "data.scores_field=scores")
    rows = [{**row, "scores": [3.0, 1.0]} for row in rows]  # the same token ids
    with pytest.raises(ConfigError, match=r"is from a different run \(margins: "):
        go("b", "data.scores_field=scores", "resume=true")
    rows[7]["scores"] = [1.0, 2.0]
    with pytest.raises(
        DataError, match=r"^stage\.margins=true: row 7 has a higher score for its rej"
    ):
        go("c", "data.scores_field=scores", "data.eval_rows=0")


def test_a_response_that_sampling_cut_is_scored_at_its_last_token(sft, tmp_path):
    rows = [{"prompt": f"The film {i}", "chosen": " was good.", "rejected": f" was bad {i}.",
             "ended": [i % 2 == 0, i % 3 == 0]} for i in range(12)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = tmp_path / "train.jsonl"
    others.write_text(path.read_text().replace("The film", "A film"))
    run_jsonl(tmp_path / "r", f"model.path={sft}", f"data.path={others}", f"data.eval_path={path}",
              "data.finished_field=ended")  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r" / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "r" / "final")
    for place, side in enumerate(("chosen", "rejected")):
        texts = [r["prompt"] + r[side] + tokenizer.eos_token * r["ended"][place] for r in rows]
        with torch.no_grad():
            values = [float(model(**tokenizer(t, return_tensors="pt")).logits) for t in texts]
        found = last(tmp_path / "r", f"eval/rewards/{side}")
        assert found == pytest.approx(sum(values) / len(values), abs=1e-5), side


@pytest.mark.parametrize("option", ["stage.label_smoothing=0.1", "stage.margins=true"])
def test_options_of_pairs_refuse_lists(sft, tmp_path, option):
    key = option.partition("=")[0]
    with pytest.raises(DataError, match=rf"^{re.escape(key)}=.*: needs pairs, but the rows have 3"):
        train(tmp_path / "r", *QUICK, f"model.path={sft}", "data.responses=3", option)


@pytest.mark.parametrize("held_out", [12, 0])
def test_the_picture_is_of_the_held_out_rows(sft, tmp_path, held_out):
    train(tmp_path / "r", *QUICK, f"model.path={sft}", "logger.plots=true",
          f"data.eval_rows={held_out}")  # fmt: skip
    picture = tmp_path / "r" / "plots" / "held_out_rewards.png"
    assert picture.exists() == bool(held_out)
    assert not held_out or picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ended_before_its_picture_draws_it_on_resuming(sft, tmp_path):
    words = (*QUICK, f"model.path={sft}", "logger.plots=true")
    train(tmp_path / "r", *words)
    picture = tmp_path / "r" / "plots" / "held_out_rewards.png"
    drawn = picture.read_bytes()
    shutil.rmtree(tmp_path / "r" / "final")
    picture.unlink()
    train(tmp_path / "r", *words, "resume=true")
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize("chat", [True, False])
def test_the_usage_in_the_model_card_scores_what_was_trained(tmp_path, chat):
    """Its two answers are the rows' own, so it must find the held-out rewards of the run."""
    tokenizer = small_tokenizers.chatml() if chat else small_tokenizers.byte_level()
    shape = GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    row = {"prompt": "Your prompt", "chosen": " One answer.", "rejected": " Another."}
    if chat:
        row = {"prompt": said("user", "Your question"), "chosen": said("assistant", "One answer."),
               "rejected": said("assistant", "Another.")}  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text(path.read_text().replace("Your", "Our"))
    run_jsonl(tmp_path / "r", f"model.path={tmp_path / 'policy'}", f"data.eval_path={path}",
              f"data.path={tmp_path / 'train.jsonl'}")  # fmt: skip
    card = (tmp_path / "r" / "final" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("path/to/this/folder", str(tmp_path / "r" / "final")), names)
    values = names["model"](**names["inputs"]).logits.squeeze(1).tolist()
    expected = [last(tmp_path / "r", f"eval/rewards/{name}") for name in ("chosen", "rejected")]
    assert values == pytest.approx(expected, abs=1e-5)
    assert f"{values[0]:.4f}" in printed.getvalue()


def run_jsonl(run_dir, *words):
    quiet = [w for w in TINY if not w.startswith("data.")]
    run(configure(*quiet, *QUICK, "data=jsonl", f"run_dir={run_dir}", *words), ["dpo-run"])


def test_the_plan_refuses_what_the_run_would(sft):
    words = (*TINY, "stage=reward", f"model.path={sft}", "run_dir=x", "model.attention=varlen")
    with pytest.raises(
        ConfigError, match=r"^model\.attention=varlen: needs a CUDA device; or use "
    ):
        plan_rows(configure(*words))


def test_the_plan_refuses_families_without_a_score(sft, tmp_path):
    shutil.copytree(sft / "final", tmp_path / "m")
    shape = json.loads((tmp_path / "m" / "config.json").read_text())
    shape |= {"model_type": "cohere", "architectures": ["CohereForCausalLM"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(shape))
    words = (*TINY, "stage=reward", f"model.path={tmp_path / 'm'}", "run_dir=x")
    with pytest.raises(ConfigError, match=r"no sequence-classification model for cohere"):
        plan_rows(configure(*words))


@pytest.mark.parametrize("kind", ["reward_model", "classifier"])
def test_the_plan_refuses_a_reward_that_scores_no_text(sft, kind):
    words = (*TINY, "stage=ppo-baseline", f"model.path={sft}", "run_dir=x", f"reward_fn={kind}")
    with pytest.raises(ConfigError, match=r"^reward_fn\.path=.*: is a GPT2LMHeadModel, which "):
        plan_rows(configure(*words, f"reward_fn.path={sft}"))


def test_the_plan_tells_what_a_judge_is_asked(sft, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    rows = plan_rows(
        configure(
            *TINY, "stage=evaluate", f"model.path={sft}", "run_dir=x", "stage.prompts=20",
            "stage.completions=2", "stage.opponent=chosen", "stage.win_temperatures=[0,1]",
            "judge=http",
        )
    )  # fmt: skip
    assert ("reward", "sentiment") in rows
    assert ("samples", "up to 20 prompts x 2 per policy") in rows
    assert ("win rates", "against chosen, by judge=http") in rows
    told = "gpt-4 at localhost:8000: up to 80 requests per policy, at most 2,000 in total"
    assert ("", told) in rows


def test_the_plan_counts_the_reward_model(sft, trained):
    rows = dict(plan_rows(configure(*TINY, "stage=reward", f"model.path={sft}", "run_dir=x")))
    model = AutoModelForSequenceClassification.from_pretrained(trained / "final")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert rows["reward model"] == f"{sft}, {millions:,.1f}M weights"
    assert rows["steps"].startswith("6 of 8 examples")
