"""stage=label: pairs worked by hand, drawn labels against their probability, implicit rewards."""

import itertools
import json
import math
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.config import DataConfig
from dpo_cli.data.dataset import load_splits
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation.measure import pairs_config
from dpo_cli.report.console import Progress
from dpo_cli.run import run
from dpo_cli.session.prompts import write_rows
from dpo_cli.statistics import share_interval
from small_runs import TINY, configure, metrics, train


def write(folder, rows, name="train"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read(folder, name="train"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def label(tmp_path, rows, *words):
    """Labels by length unless `words` say otherwise; the summary and the rows written."""
    samples = write(tmp_path / "samples", rows)
    found = train(tmp_path / "labels", "stage=label", f"stage.samples={samples}",
                  "reward_fn=length", *words)  # fmt: skip
    return found, read(tmp_path / "labels")


def test_all_pairs_by_hand(tmp_path):
    rows = [
        {"prompt": "a", "completions": [" \n", " x", " x y z", " y"],
         "finished": [True, True, False, True], "temperature": 1.0},
        {"prompt": [{"role": "user", "content": "b"}], "completions": [" 1 2\u2028", " 1"]},
        {"prompt": "c", "completions": [" same", " same"]},
        {"prompt": "d", "completions": [" alone"]},
    ]  # fmt: skip
    found, pairs = label(tmp_path, rows)
    assert pairs == [
        {"prompt": "a", "chosen": " x y z", "rejected": " x", "scores": [3.0, 1.0],
         "finished": [False, True]},
        {"prompt": "a", "chosen": " x y z", "rejected": " y", "scores": [3.0, 1.0],
         "finished": [False, True]},
        {"prompt": rows[1]["prompt"], "chosen": " 1 2\u2028", "rejected": " 1",
         "scores": [2.0, 1.0]},
    ]  # fmt: skip
    assert found["train_pairs"] == 3
    assert found["train_mean_gap"] == pytest.approx((2 + 2 + 1) / 3)
    assert found["train_ties"] == pytest.approx(2 / 5)  # of 3 + 1 + 1 pairs
    assert "train_agreement" not in found
    assert "eval_pairs" not in found


@pytest.mark.parametrize(("finished", "told"), [([True, False], 1), ([True, True], 0)])
def test_completions_that_were_cut_are_told(tmp_path, monkeypatch, finished, told):
    """Without data.finished_field they would get an EOS that nobody sampled."""
    lines = []
    monkeypatch.setattr(Progress, "note", lambda self, line: lines.append(line))
    texts = [" x", " x y", " "]
    label(tmp_path, [{"prompt": "a", "completions": texts, "finished": [*finished, True]}])
    assert len([line for line in lines if "1 completion was truncated by" in line]) == told
    assert "train: 1 blank completion is dropped" in lines


def test_both_files_are_labelled(tmp_path):
    write(tmp_path / "samples", [{"prompt": "p", "completions": [" a b", " a"]}], "eval")
    found, _ = label(tmp_path, [{"prompt": "q", "completions": [" a b c", " a"]}])
    assert (found["train_mean_gap"], found["eval_mean_gap"]) == (2.0, 1.0)
    assert read(tmp_path / "labels", "eval")[0]["prompt"] == "p"


MANY = [{"prompt": str(i), "completions": [" a b c", " a"]} for i in range(2000)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("stage.labels=bradley_terry",), 1 / (1 + math.exp(-2.0))),
        (("stage.labels=bradley_terry", "stage.temperature=4"), 1 / (1 + math.exp(-0.5))),
        (("stage.flip_rate=0.3",), 0.7),
        (("stage.labels=bradley_terry", "stage.temperature=2", "stage.flip_rate=0.2"),
         0.8 / (1 + math.exp(-1.0)) + 0.2 / (1 + math.exp(1.0))),
    ],
)  # fmt: skip
def test_labels_are_drawn_with_their_probability(tmp_path, words, expected):
    found, pairs = label(tmp_path, MANY, *words)
    right = sum(row["scores"][0] > row["scores"][1] for row in pairs) / len(pairs)
    assert len(pairs) == len(MANY)
    assert abs(right - expected) < 4 * math.sqrt(expected * (1 - expected) / len(pairs))
    assert found["train_agreement"] == pytest.approx(right)
    assert found["train_mean_gap"] == pytest.approx(2.0 * (2.0 * right - 1.0))
    assert {row["chosen"] for row in pairs} == {" a b c", " a"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a row {prompt, completions} of stage"),
        ('{"completions": ["a"]}', "'prompt'"),
        ('{"prompt": "a", "completions": "b"}', "completions must be a list of strings"),
        (
            '{"prompt": "a", "completions": ["b"], "finished": []}',
            "finished must be a list of one bool",
        ),
        (
            '{"prompt": "a", "completions": ["b"], "finished": [1]}',
            "finished has int instead of",
        ),
        ('{"prompt": 3, "completions": ["b"]}', "prompt is int, not a list of messages"),
        ("[]", "not a row {prompt"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, why):
    with pytest.raises(DataError, match=r"train\.jsonl:2: not a row \{prompt") as error:
        label(tmp_path, [MANY[0], line])
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_samples_that_make_no_pair(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: no two .* differ.*another reward_fn"):
        label(tmp_path, [{"prompt": "c", "completions": [" a", " b"]}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^stage\.samples=\S+: contains no train\.jsonl or eval"):
        train(tmp_path / "x", "stage=label", f"stage.samples={tmp_path / 'empty'}")


# ---------------------------------------------------------------- implicit rewards


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label") / "sft"
    train(folder, "stage=sft", "train.max_steps=2", "optim.lr=3e-3")
    return folder


@pytest.fixture(scope="module")
def policy(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("label") / "dpo"
    train(folder, "stage=dpo", "train.max_steps=2", "optim.lr=3e-3", f"model.path={sft}")
    return folder


ROWS = [
    {"prompt": "The film", "completions": [" was good .", " was a long dull film .", " bad"],
     "finished": [True, False, True]},
    {"prompt": "I saw it and", "completions": [" slept", " was moved by it ."]},
]  # fmt: skip


def logprob(folder, prompt, completion, finished):
    """log p of the completion's tokens, with EOS if it ended, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    before, after = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
    after += [tokenizer.eos_token_id] * finished
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


@pytest.mark.parametrize("named", [False, True])
def test_implicit_labels_are_those_of_hand_made_log_probs(tmp_path, sft, policy, named):
    words = [f"stage.reference={sft}"] if named else []  # else the policy knows its own
    found, pairs = label(tmp_path, ROWS, "stage.by=implicit", "stage.beta=0.5",
                         f"model.path={policy}", *words)  # fmt: skip
    rewards = {
        (row["prompt"], text): 0.5 * (logprob(policy, row["prompt"], text, ended)
                                      - logprob(sft, row["prompt"], text, ended))
        for row in ROWS
        for text, ended in zip(row["completions"], row.get("finished", [True, True]), strict=True)
    }  # fmt: skip
    assert found["train_pairs"] == len(pairs) == 4
    for row in pairs:
        expected = [rewards[row["prompt"], row[side]] for side in ("chosen", "rejected")]
        assert row["scores"] == pytest.approx(expected, abs=1e-4)
        assert expected[0] > expected[1]
    assert max(abs(r) for r in rewards.values()) > 0.05  # the policy did move


def test_an_accuracy_has_the_error_of_its_prompts(tmp_path, sft, policy):
    """Pairs of one prompt depend on each other: the errors, worked from each pair's own forwards,
    are over prompts, in whatever order the rows are packed."""

    def rho(prompt, text):
        return logprob(policy, prompt, text, True) - logprob(sft, prompt, text, True)

    texts = [text for row in ROWS for text in row["completions"]]
    pairs = []
    for place, row in enumerate(ROWS):  # those of one prompt are all right, of the others all wrong
        ranked = sorted(dict.fromkeys(texts), key=lambda text: rho(row["prompt"], text))
        for worse, better in itertools.pairwise(ranked[: 4 - place % 2]):
            sides = (better, worse) if place == 0 else (worse, better)
            pairs.append({"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]})
    path = write(tmp_path / "pairs", pairs) / "train.jsonl"
    words = [w for w in TINY if w.startswith(("logger", "hardware"))]
    figures = run(configure(
        *words, "stage=evaluate", f"model.path={policy}", f"stage.reference={sft}",
        f"stage.pairs={path}", "stage.prompts=2", "stage.max_new_tokens=2",
        f"run_dir={tmp_path / 'e'}",
    ), ["dpo-run"])  # fmt: skip

    right = [
        float(rho(pair["prompt"], pair["chosen"]) > rho(pair["prompt"], pair["rejected"]))
        for pair in pairs
    ]
    mean = sum(right) / len(right)
    of_prompt = {row["prompt"]: 0.0 for row in ROWS}
    for pair, value in zip(pairs, right, strict=True):
        of_prompt[pair["prompt"]] += value - mean
    count = len(of_prompt)
    spread = sum(total**2 for total in of_prompt.values()) * count / (count - 1)
    assert figures["pairs"] == len(pairs) > count > 1
    assert figures["accuracy"] == pytest.approx(mean)
    assert figures["accuracy_se"] == pytest.approx(math.sqrt(spread) / len(pairs))
    wilson = share_interval(mean, count)
    assert figures["accuracy_low"] == pytest.approx(wilson.low)
    assert figures["accuracy_high"] == pytest.approx(wilson.high)


@pytest.mark.parametrize("field", [None, "finished"])
def test_what_is_labelled_can_be_trained_on(tmp_path, sft, policy, field):
    """As sampled: EOS follows a completion that ended, and no other, if the field is named."""
    rows = [ROWS[0], ROWS[1] | {"finished": [False, True]}]
    _, pairs = label(tmp_path, rows, "stage.by=implicit", f"model.path={policy}")
    ended = {(row["prompt"], text): flag for row in rows
             for text, flag in zip(row["completions"], row["finished"], strict=True)}  # fmt: skip
    sides = ("chosen", "rejected")
    assert [[ended[p["prompt"], p[s]] for s in sides] for p in pairs] == [
        p["finished"] for p in pairs
    ]
    quiet = [word for word in TINY if not word.startswith("data.")]
    path = tmp_path / "labels" / "train.jsonl"
    # as evaluations read them
    assert pairs_config(str(path), DataConfig()).finished_field == "finished"
    run(configure(*quiet, "stage=dpo", "data=jsonl", f"data.path={path}", "data.eval_rows=0",
                  f"data.finished_field={field or 'null'}", "train.batch_size=4",
                  f"model.path={sft}", f"run_dir={tmp_path / 'next'}"),
        ["dpo-run"])  # fmt: skip
    (row,) = [row for row in metrics(tmp_path / "next") if "logps/chosen" in row]
    for place, side in enumerate(sides):
        expected = [
            logprob(sft, pair["prompt"], pair[side], pair["finished"][place] or field is None)
            for pair in pairs
        ]
        assert row[f"logps/{side}"] == pytest.approx(sum(expected) / 4, abs=1e-3)


def test_pairs_that_do_not_say_what_is_finished_are_whole(tmp_path):
    folder = write(tmp_path, [{"prompt": "a", "chosen": " b", "rejected": " c", "finished": 1.0}])
    assert pairs_config(str(folder / "train.jsonl"), DataConfig()).finished_field is None


def test_a_policy_without_another_reference(tmp_path, sft):
    with pytest.raises(
        ConfigError, match=r"^stage\.reference=null: \S+ does not name the reference"
    ):
        label(tmp_path, ROWS, "stage.by=implicit", f"model.path={sft}")
    with pytest.raises(ConfigError, match=r"^stage\.reference=\S+: is model\.path itself"):
        label(tmp_path, ROWS, "stage.by=implicit", f"model.path={sft}", f"stage.reference={sft}",
              f"run_dir={tmp_path / 'again'}")  # fmt: skip


def test_torn_and_unfinished_samples_are_refused(tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    row = {"prompt": "a", "completions": [" x", " x y"]}
    write_rows(samples / "train.jsonl", [row, row])
    os.truncate(samples / "train.jsonl", (samples / "train.jsonl").stat().st_size // 2 + 1)
    words = ("stage=label", f"stage.samples={samples}", "reward_fn=length")
    with pytest.raises(DataError, match=r"train\.jsonl: truncated or changed since it was written"):
        train(tmp_path / "labels", *words)
    write_rows(samples / "train.jsonl", [row, row])
    (samples / "config.yaml").touch()
    with pytest.raises(DataError, match=r"this run did not finish.*dpo-run resume="):
        train(tmp_path / "labels", *words)


def test_pairs_that_were_torn_are_not_trained_on(tmp_path):
    rows = [{"prompt": "a", "chosen": f" b {i}", "rejected": " c"} for i in range(3)]
    write_rows(tmp_path / "train.jsonl", rows)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]))  # whole lines: it can be read
    config = configure("data=jsonl", f"data.path={tmp_path / 'train.jsonl'}", "stage=dpo")
    with pytest.raises(DataError, match=r"remove train\.jsonl\.sha256 if you changed it"):
        load_splits(config.data, 0)
