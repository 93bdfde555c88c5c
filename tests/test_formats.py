"""Rows in other tools' formats: the same pair gives the same token ids in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import tokenizer
from composing import problems
from dpo_cli.config import JsonlDataConfig
from dpo_cli.config.datasets import FORMATS
from dpo_cli.data.adapters.formats import READERS
from dpo_cli.data.dataset import load_splits
from dpo_cli.data.drops import DropReport
from dpo_cli.data.encode import encode_examples
from dpo_cli.data.limits import Limits
from dpo_cli.data.part import Splits
from dpo_cli.errors import ConfigError, DataError
from small_runs import metrics, train_on_rows

Q, GOOD, BAD = "Why is the sky blue?", "Rayleigh scattering.", "It is painted."
USER = {"role": "user", "content": Q}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


HUMAN = {"from": "human", "value": Q}
PAIRS: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"prompt": Q, "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
        {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
        {"chosen": json.dumps([USER, said(GOOD)]), "rejected": json.dumps([USER, said(BAD)])},
        {"prompt": Q, "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)], "messages": []},
        {"question": Q, "chosen": GOOD, "rejected": BAD},
        {"question": Q, "response_j": GOOD, "response_k": BAD},
        {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD, "chosen_rating": 5},
    ],
    "sharegpt": [{"conversations": [HUMAN], "chosen": gpt(GOOD), "rejected": gpt(BAD)}],
    "swift": [
        {"messages": [USER, said(GOOD)], "rejected_response": BAD},
        {"messages": [USER, said(GOOD)], "rejected_messages": [USER, said(BAD)]},
    ],
    "axolotl": [
        {"messages": [USER], "chosen": said(GOOD), "rejected": said(BAD)},
        {"conversations": [USER], "chosen": said(GOOD), "rejected": said(BAD)},
    ],
    "nemo": [
        {"context": [USER], "completions": [
            {"rank": 1, "completion": [said(BAD)]}, {"rank": 0, "completion": [said(GOOD)]}]},
    ],
    "alpaca": [
        {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    ],
    "ultrafeedback": [
        {"instruction": Q, "source": "x", "completions": [
            {"response": BAD, "overall_score": 2.0}, {"response": GOOD, "overall_score": 8.5}]},
    ],
    "nectar": [
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [
            {"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]},
    ],
    "helpsteer": [
        {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -2},
        {"context": [USER], "response1": BAD, "response2": GOOD, "overall_preference": 1},
    ],
    "ranked": [
        {"prompt": Q, "responses": [GOOD, BAD]},
        {"prompt": Q, "responses": [BAD, GOOD], "scores": [0.5, 0.75]},
    ],
}  # fmt: skip
DEMONSTRATIONS: dict[str, list[dict[str, Any]]] = {
    "completion": [
        {"prompt": Q, "completion": GOOD}, {"prompt": [USER], "completion": [said(GOOD)]},
        {"question": Q, "answer": GOOD}, {"prompt": Q, "response": GOOD},
        {"prompt": Q, "chosen": GOOD},
    ],
    "messages": [{"messages": [USER, said(GOOD)]}, {"conversations": [USER, said(GOOD)]}],
    "sharegpt": [{"conversations": [HUMAN, gpt(GOOD)]}],
    "alpaca": [{"instruction": Q, "input": "", "output": GOOD}],
    "kto": [
        {"prompt": Q, "completion": GOOD, "label": True},
        {"messages": [USER, said(GOOD)], "label": False},
    ],
}  # fmt: skip


def read(folder: Path, *rows: dict[str, Any], **settings: Any) -> tuple[Splits, JsonlDataConfig]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JsonlDataConfig(path=str(path), chat_template="always", date="2026-01-31", **settings)
    return load_splits(config, 0), config


def ids(folder: Path, row: dict[str, Any], **settings: Any) -> list[list[int]]:
    splits, config = read(folder, row, **settings)
    (encoded,) = encode_examples(
        splits.train, tokenizer("ChatML"), config, Limits(512, 256), DropReport()
    )
    return [encoded.prompt_ids.tolist(), *(r.tolist() for r in encoded.response_ids)]


def cases(table: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, rows in table.items() for row in rows]


def test_each_format_has_a_reader():
    assert READERS.keys() == FORMATS.keys()


@pytest.mark.parametrize(("name", "row"), cases(PAIRS))
def test_a_pair_has_the_same_tokens_in_each(tmp_path, name, row):
    splits, _ = read(tmp_path, row)
    assert splits.drops.reading == [f"1 rows, read as {name} ({FORMATS[name]})"]
    expected = ids(tmp_path, {"prompt": Q, "chosen": GOOD, "rejected": BAD}, format="columns")
    assert ids(tmp_path, row) == ids(tmp_path, row, format=name) == expected


@pytest.mark.parametrize(("name", "row"), cases(DEMONSTRATIONS))
def test_a_demonstration_has_the_same_tokens_in_each(tmp_path, name, row):
    splits, _ = read(tmp_path, row)
    assert splits.drops.reading == [f"1 rows, read as {name} ({FORMATS[name]})"]
    own = {"prompt": Q, "chosen": GOOD}
    expected = ids(tmp_path, own, format="columns", rejected_field=None)
    assert ids(tmp_path, row) == ids(tmp_path, row, format=name) == expected


def test_two_texts_share_their_prompt(tmp_path):
    """It ends before white space, not within a word; transcripts end with the assistant's turn."""
    (one,) = read(tmp_path, {"chosen": "Say it: never mind", "rejected": "Say it: now"})[0].train
    assert (one.prompt, one.responses) == ("Say it:", (" never mind", " now"))
    talk = "\n\nHuman: Hi\n\nAssistant:"
    (two,) = read(tmp_path, {"chosen": f"{talk} yes it is", "rejected": f"{talk} yes"})[0].train
    assert (two.prompt, two.responses) == (talk, (" yes it is", " yes"))
    with pytest.raises(DataError, match="no column 'prompt'"):
        read(tmp_path, {"chosen": "one", "rejected": "two"})
    with pytest.raises(DataError, match="chosen begins with no prompt"):
        read(tmp_path, {"chosen": "one", "rejected": "two"}, format="implicit")


def test_a_text_has_no_prompt(tmp_path):
    (example,) = read(tmp_path, {"text": "Once upon a time"})[0].train
    assert (example.prompt, example.responses) == ("", ("Once upon a time",))


def test_alpacas_input_and_history(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Count.",
           "history": [["Hi", "Hello"]]}  # fmt: skip
    (example,) = read(tmp_path, row)[0].train
    assert example.prompt == [
        {"role": "system", "content": "Count."}, {"role": "user", "content": "Hi"}, said("Hello"),
        {"role": "user", "content": "Add\n1 2"},
    ]  # fmt: skip


def test_sharegpts_functions(tmp_path):
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    turns = [HUMAN, call, {"from": "observation", "value": "3"}, gpt("Three.")]
    tools = '[{"name": "add", "description": "", "parameters": {}}]'
    (example,) = read(tmp_path, {"conversations": turns, "tools": tools, "system": "S"})[0].train
    assert [m["role"] for m in example.prompt] == ["system", "user", "assistant", "tool"]
    function = {"name": "add", "arguments": {"a": 1}}
    assert example.prompt[2]["tool_calls"] == [{"type": "function", "function": function}]
    assert example.prompt[0]["tools"][0]["name"] == "add"
    assert example.responses == ("Three.",)


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "1"])
def test_labels(tmp_path, label):
    (example,) = read(tmp_path, {"prompt": Q, "response": GOOD, "label": label})[0].train
    assert example.scores == (float(label in (True, "true", "1")),)


def test_the_format_holds_for_all_rows(tmp_path):
    """A pair without its rejected response is a bad row, not a demonstration."""
    pair = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    splits, _ = read(tmp_path, pair | {"rejected": None}, pair, pair | {"prompt": "And the sea?"})
    assert len(splits.train) == 2
    assert splits.drops.dropped == {"rejected is None, not text": [0]}
    splits, _ = read(tmp_path, {"prompt": Q}, {"prompt": Q}, pair)
    assert len(splits.train) == 1
    assert splits.drops.dropped == {"chosen is missing": [0, 1]}


def test_keys_that_name_columns_take_precedence(tmp_path):
    row = {"messages": [USER, said(BAD)], "prompt": Q, "good": GOOD, "rejected": BAD}
    splits, _ = read(tmp_path, row, chosen_field="good")
    assert splits.train[0].responses == (GOOD, BAD)
    assert splits.drops.reading == []


def test_ties_and_bad_rows_are_dropped_with_their_reason(tmp_path):
    pair = {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": 1}
    rows = [pair, pair | {"preference_strength": 0}, pair | {"preference_strength": "much"}]
    dropped = read(tmp_path, *rows)[0].drops.dropped
    assert dropped == {
        "preference_strength is 0, so that no response is preferred": [1],
        "preference_strength is str, not a number": [2],
    }
    turns = [HUMAN, {"from": "narrator", "value": "x"}, gpt("y")]
    rows = [{"conversations": [HUMAN, gpt(GOOD)]}, {"conversations": turns}, {"conversations": 3}]
    reasons = list(read(tmp_path, *rows)[0].drops.dropped)
    assert reasons[0].startswith("conversations has a turn from 'narrator', not one of human")
    assert reasons[1] == "conversations is int, not a list of turns"


def test_a_chosen_format_and_column_keys_exclude_each_other():
    words = ["stage=sft", "data=jsonl", "data.path=x", "model=tiny", "data.format=alpaca"]
    assert problems([*words, "data.chosen_field=good"])[-1] == (
        "data.chosen_field=good: has no effect with data.format=alpaca; remove it"
    )


def rows_file(folder: Path, *rows: dict[str, Any]) -> list[str]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=jsonl", f"data.path={path}", "train.max_steps=1", "train.batch_size=2"]


FILMS = ["A film", "This movie", "The story", "An actor", "The music", "A scene"]


def test_labels_train_kto_and_nothing_that_would_take_all_for_good(tmp_path):
    rows = [{"prompt": f, "completion": " good", "label": i % 2 == 0} for i, f in enumerate(FILMS)]
    words = rows_file(tmp_path, *rows)
    train_on_rows(tmp_path / "k", "stage=kto", *words, "data.eval_rows=2")
    assert any("loss" in row for row in metrics(tmp_path / "k"))
    with pytest.raises(DataError, match="a label each, which stage=sft does not read: use stage=k"):
        train_on_rows(tmp_path / "s", "stage=sft", *words)
    words = rows_file(tmp_path, *({"prompt": film, "completion": " good"} for film in FILMS))
    with pytest.raises(DataError, match="row 0 has one response and no label"):
        train_on_rows(tmp_path / "p", "stage=kto", *words)


def test_prompts_alone_are_sampled_from(tmp_path):
    words = rows_file(tmp_path, *({"prompt": film} for film in FILMS))
    ppo = (
        "train.batch_size=4",
        "train.max_steps=4",
        "stage.rollout_samples=4",
        "stage.normalize=false",
    )
    sampling = ("reward_fn=length", "stage.max_new_tokens=4", "train.sample_prompts=0")
    train_on_rows(tmp_path / "p", "stage=ppo-baseline", *words, *ppo, *sampling)
    assert any("score" in row for row in metrics(tmp_path / "p"))
    with pytest.raises(DataError, match=r"row 0 has 0 response\(s\), but 2 are needed"):
        train_on_rows(tmp_path / "d", "stage=dpo", *words)
    with pytest.raises(ConfigError, match="the rows have no responses to set it by"):
        train_on_rows(tmp_path / "n", "stage=ppo-baseline", *words, *ppo, "reward_fn=length")
