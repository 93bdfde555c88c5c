"""Rows as users bring them: what is not read as it was meant is told, with a count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import tokenizer
from dpo_cli.config import JsonlDataConfig
from dpo_cli.data.dataset import load_splits
from dpo_cli.data.drops import DropReport
from dpo_cli.data.encode import encode_examples
from dpo_cli.data.held_out import hold_out
from dpo_cli.data.limits import Limits
from dpo_cli.data.part import Splits
from dpo_cli.data.trained import prompt_key
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.records import PreferenceExample

WIDE = Limits(4096, 2048)
Rows = list[dict[str, Any]]


def read(folder: Path, rows: Rows, **config: Any) -> tuple[JsonlDataConfig, Splits]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = JsonlDataConfig(path=str(path), date="2026-01-31", **config)
    return settings, load_splits(settings, 0)


def texts(family: str, config: JsonlDataConfig, splits: Splits) -> tuple[list[str], DropReport]:
    """Prompts as the model gets them, and what is told."""
    of = tokenizer(family) if family else plain()
    report = DropReport()
    encoded = encode_examples(splits.train, of, config, WIDE, report)
    return [of.decode(e.prompt_ids) for e in encoded], report


def plain() -> Any:
    of = tokenizer("ChatML")
    of.chat_template = None
    return of


# scores

LISTS = {"responses_field": "responses", "scores_field": "scores"}


def scored(*scores: Any) -> dict[str, Any]:
    return {"prompt": "q ", "responses": ["A", "B", "C"][: len(scores)], "scores": list(scores)}


@pytest.mark.parametrize(
    ("scores", "order"),
    [((1, 9), "BA"), ((9, 1), "AB"), ((-1.5, -3), "AB"), ((1, 9, 5), "BCA"), ((5, 5, 9), "CAB")],
)
def test_ranked_lists_are_ordered_by_score(tmp_path, scores, order):
    _, splits = read(tmp_path, [scored(*scores)], **LISTS)
    assert "".join(map(str, splits.train[0].responses)) == order
    assert list(splits.train[0].scores or ()) == sorted(scores, reverse=True)
    told = splits.drops.summary_lines()
    assert told == [
        "note on 1 of 1 rows: some responses have the same score: their order is the row's (row 0)"
    ] * (len(set(scores)) < len(scores))


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ((5, 5), "scores are all equal, so that no response is preferred"),
        ((5, 5, 5), "scores are all equal, so that no response is preferred"),
        ((None, 1), "scores is None, not a number"),
        (("9", "10"), "scores is str, not a number"),
        ((float("nan"), 1), "scores is not a finite number"),
        ((True, False), "scores is bool, not a number"),
    ],
)
def test_scores_that_rank_nothing_drop_the_row(tmp_path, scores, why):
    _, splits = read(tmp_path, [scored(1, 2), scored(*scores)], **LISTS)
    assert len(splits.train) == 1
    assert splits.drops.summary_lines() == [f"dropped 1 of 2 rows: {why} (row 1)"]


def test_pairs_whose_scores_say_otherwise_are_told(tmp_path):
    rows = [{"prompt": "q ", "chosen": "A", "rejected": "B", "scores": s}
            for s in ([9, 1], [1, 9], [4, 4])]  # fmt: skip
    _, splits = read(tmp_path, rows, scores_field="scores")
    assert splits.drops.summary_lines() == [
        "note on 1 of 3 rows: the rejected response has the higher score (row 1)",
        "note on 1 of 3 rows: some responses have the same score: their order is the row's (row 2)",
    ]
    assert all(e.responses == ("A", "B") for e in splits.train)  # as the columns say


# a system column

PIRATE = "Talk like a pirate."
ASKED = {"chosen": "Arr.", "rejected": "No."}


def wanted(family: str, *messages: tuple[str, str]) -> str:
    """The oracle: transformers' own rendering."""
    talk = [{"role": role, "content": content} for role, content in messages]
    return tokenizer(family).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["ChatML", "Zephyr"])
@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_system_column_is_the_system_message(tmp_path, family, form):
    prompt: Any = "Hi?" if form == "text" else [{"role": "user", "content": "Hi?"}]
    rows = [{"system": said, "prompt": prompt, **ASKED} for said in (PIRATE, "", None)]
    told, report = texts(family, *read(tmp_path, rows))
    bare = wanted(family, ("user", "Hi?"))
    assert told == [wanted(family, ("system", PIRATE), ("user", "Hi?")), bare, bare]
    assert not report.summary_lines()


def test_a_system_column_can_be_left_out_or_named(tmp_path):
    row = {"system": PIRATE, "rules": "Rhyme.", "prompt": "Hi? ", **ASKED}
    assert read(tmp_path, [row], system_field=None)[1].train[0].prompt == "Hi? "
    named = read(tmp_path, [row], system_field="rules")[1].train[0].prompt
    assert named[0] == {"role": "system", "content": "Rhyme."}


def test_a_system_column_beside_another_system_message(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    row = {"prompt": talk, **ASKED}
    _, splits = read(tmp_path, [row | {"system": "Be brief. "}, row | {"system": PIRATE}])
    assert [e.prompt for e in splits.train] == [talk]
    assert splits.drops.summary_lines() == [
        "dropped 1 of 2 rows: system differs from the system message of the prompt (row 1)"
    ]


@pytest.mark.parametrize("said", [(PIRATE, None), (None, PIRATE)])
def test_an_eval_file_is_in_the_form_of_the_training_rows(tmp_path, said):
    """Though only one of the two has system messages."""
    first, held = ({"system": text, "prompt": f"{text}?", **ASKED} for text in said)
    (tmp_path / "held.jsonl").write_text(json.dumps(held))
    _, splits = read(tmp_path, [first], eval_path=str(tmp_path / "held.jsonl"))
    for (example,), text in zip((splits.train, splits.eval), said, strict=True):
        before = [{"role": "system", "content": text}] if text else []
        assert example.prompt == [*before, {"role": "user", "content": f"{text}?"}]


def test_a_system_column_needs_a_template(tmp_path):
    config, splits = read(tmp_path, [{"system": PIRATE, "prompt": "Hi?", **ASKED}])
    with pytest.raises(ConfigError, match=r"or data\.system_field=null to use the texts") as error:
        encode_examples(splits.train, plain(), config, WIDE, DropReport())
    assert "\n" not in str(error.value)


def test_texts_on_a_chat_model_are_told(tmp_path):
    told, report = texts("ChatML", *read(tmp_path, [{"prompt": "Hi? ", **ASKED}] * 3))
    assert told == ["Hi? "] * 3
    (line,) = report.summary_lines()
    assert line.startswith("note on 3 of 0 rows: texts are used without the model's chat template")


# separators


@pytest.mark.parametrize(
    ("prompt", "response", "told"),
    [
        ("Situation?", "My girlfriend", True),
        ("situation", "My", True),
        ("Answer:", "42", True),
        ('Say "hi"', "Hi", True),
        ("Как дела?", "Хорошо", True),
        ("Wie alt?", "Älter", True),
        ("List them.", "- one\n- two", True),
        ("Quote.", '"So be it"', True),
        ("Head.", "# One", True),
        ("Situation? ", "My", False),
        ("Situation?", " My", False),
        ("Situation?\n\n", "My", False),
        ("Situation?", "\nMy", False),
        ("a film", ", which was", False),
        ("what a film", "!", False),
        ('She said: "', "yes", False),
        ("f(", "x)", False),
        ("你好吗", "很好", False),
        ("お元気ですか", "はい", False),
        ("สบายดี", "ไหม", False),
    ],
)
def test_words_that_run_into_each_other_are_told(tmp_path, prompt, response, told):
    row = {"prompt": prompt, "chosen": response, "rejected": " other"}
    _, report = texts("", *read(tmp_path, [row]))
    lines = [line for line in report.summary_lines() if "without a separator between words" in line]
    assert len(lines) == told


# the same prompts in another form

PROMPTS = [f"Question {n}:\n\nwhat is  {n} times {n}?" for n in range(60)]
FORMS = {
    "separator": lambda p: p + "\n\n",
    "stripped": lambda p: f" {p} ",
    "line ends": lambda p: p.replace("\n", "\r\n"),
    "messages": lambda p: [{"role": "user", "content": p}],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_another_form_holds_out_the_same_prompts(form):
    def examples(change: Any) -> list[PreferenceExample]:
        return [PreferenceExample(change(p), ("a", "b"), n) for n, p in enumerate(PROMPTS)]

    one, other = (hold_out(examples(f), 12)[1] for f in (lambda p: p, FORMS[form]))
    assert [e.row for e in one] == [e.row for e in other]
    assert [prompt_key(e.prompt) for e in one] == [prompt_key(e.prompt) for e in other]


@pytest.mark.parametrize("change", [*FORMS.values(), lambda p: " ".join(p.split())])
def test_an_eval_file_that_is_the_training_file_in_another_form(tmp_path, change):
    row = {"chosen": "A", "rejected": "B"}
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row | {"prompt": change(p)}) + "\n" for p in PROMPTS[:7]))
    rows = [row | {"prompt": p} for p in PROMPTS]
    _, splits = read(tmp_path, rows, eval_path=str(held))
    (line,) = splits.drops.summary_lines()
    assert line.startswith("note on 7 of 67 rows: eval split: the prompt is also a training prompt")


def test_prompts_of_other_words_are_other_prompts():
    keys = [prompt_key(p) for p in ("a b", "ab", "A b", "a b.", "b a")]
    assert len(set(keys)) == len(keys)
    assert prompt_key("caf\u00e9") == prompt_key("cafe\u0301")


def test_rows_without_any_ranking_are_refused_as_a_whole(tmp_path):
    with pytest.raises(DataError, match="no row can be used: dropped 2 of 2 rows: scores are all"):
        read(tmp_path, [scored(1, 1), scored(2, 2)], **LISTS)
