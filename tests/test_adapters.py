"""Adapters: each data set's rows by hand, and rows no one would write."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.config import (
    DATA_SCHEMAS,
    HhDataConfig,
    ImdbDataConfig,
    JsonlDataConfig,
    SeDataConfig,
    ShpDataConfig,
    TldrDataConfig,
    UltrafeedbackDataConfig,
)
from dpo_cli.data.adapt import adapt
from dpo_cli.data.adapters import ADAPTERS, hh, imdb, jsonl, se, shp, tldr, ultrafeedback
from dpo_cli.data.drops import BadRow, DropReport
from dpo_cli.data.sources import Rows
from dpo_cli.errors import DataError
from dpo_cli.records import PreferenceExample


def only(examples: Iterable[PreferenceExample]) -> PreferenceExample:
    (example,) = examples
    return example


def reason(parse: Any, row: dict[str, Any], config: Any) -> str:
    with pytest.raises(BadRow) as caught:
        list(parse(row, 0, config))
    return str(caught.value)


def test_every_data_set_has_an_adapter() -> None:
    assert set(ADAPTERS) | {"sentiment", "mix"} == set(DATA_SCHEMAS)


class TestHh:
    def test_prompt_ends_with_the_last_shared_marker(self) -> None:
        start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: name one\n\nAssistant:"
        row = {"chosen": start + " The cat.", "rejected": start + " The dog."}
        example = only(hh.parse(row, 7, HhDataConfig()))
        # not "... The ", the longest common prefix
        assert example == PreferenceExample(start, (" The cat.", " The dog."), 7)

    def test_marker_inside_an_answer(self) -> None:
        start = "\n\nHuman: hi\n\nAssistant:"
        longer = " Here is one:\n\nAssistant: ok."
        for pair in ((longer, " No."), (" No.", longer)):
            row = {"chosen": start + pair[0], "rejected": start + pair[1]}
            assert only(hh.parse(row, 0, HhDataConfig())) == PreferenceExample(start, pair, 0)

    def test_other_dialogues(self) -> None:
        start = "\n\nHuman: hi\n\nAssistant:"
        early = {
            "chosen": start + " a\n\nHuman: b\n\nAssistant: c",
            "rejected": start + " x\n\nHuman: y\n\nAssistant: z",
        }
        assert "human turn" in reason(hh.parse, early, HhDataConfig())
        other = {"chosen": start + " a", "rejected": "\n\nHuman: you\n\nAssistant: a"}
        assert reason(hh.parse, other, HhDataConfig()) == "rejected shares no dialogue with chosen"

    def test_as_messages(self) -> None:
        start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: name one\n\nAssistant:"
        row = {"chosen": start + " cat ", "rejected": start + " dog"}
        example = only(hh.parse(row, 0, HhDataConfig(chat_template="always")))
        assert example.responses == ("cat", "dog")
        assert example.prompt == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "name one"},
        ]

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            ("Note.\n\nHuman: hi\n\nAssistant:", "does not begin with a turn"),
            (
                "\n\nHuman: hi\n\nAssistant: a\n\nAssistant:",
                "ends with a message of role assistant",
            ),
            ("\n\nAssistant:", "no message before the answer"),
        ],
    )
    def test_not_a_chat(self, start: str, message: str) -> None:
        row = {"chosen": start + " a", "rejected": start + " b"}
        assert only(hh.parse(row, 0, HhDataConfig())).prompt == start
        assert message in reason(hh.parse, row, HhDataConfig(chat_template="always"))

    def test_real_file(self, shared: Path) -> None:
        with gzip.open(shared / "data/preferences/hh_harmless_base_test.jsonl.gz") as lines:
            rows = [json.loads(line) for line in lines]
        moved = 0
        for index, row in enumerate(rows):
            example = only(hh.parse(row, index, HhDataConfig()))
            assert isinstance(example.prompt, str)
            assert [example.prompt + r for r in example.responses] == [
                row["chosen"],
                row["rejected"],
            ]
            assert example.prompt.endswith("\n\nAssistant:")
            assert not any("\n\nHuman:" in r for r in example.responses)
            last = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
            moved += example.prompt != row["chosen"][:last]
        assert len(rows) == 2312
        assert moved == 4  # rows whose chosen answer holds the marker itself


class TestShp:
    row: dict[str, Any] = {  # noqa: RUF012
        "history": "why?", "human_ref_A": "A", "human_ref_B": "B",
        "score_A": 3, "score_B": 12, "labels": 0,
    }  # fmt: skip

    def test_winner_by_label(self) -> None:
        prompt = "\n\nHuman: why?\n\nAssistant:"
        b_wins = only(shp.parse(self.row, 1, ShpDataConfig()))
        assert b_wins == PreferenceExample(prompt, (" B", " A"), 1, (12.0, 3.0))
        row = {**self.row, "labels": 1, "score_A": 12, "score_B": 6}
        a_wins = only(shp.parse(row, 1, ShpDataConfig()))
        assert a_wins == PreferenceExample(prompt, (" A", " B"), 1, (12.0, 6.0))

    def test_close_votes_are_dropped_with_their_reason(self) -> None:
        assert "min_score_ratio=5" in reason(shp.parse, self.row, ShpDataConfig(min_score_ratio=5))
        assert only(shp.parse(self.row, 1, ShpDataConfig(min_score_ratio=4)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"score_A": 0}, "not positive"),
            ({"score_A": True}, "score_A is bool, not a number"),
            ({"score_A": float("nan")}, "not a finite number"),
            ({"labels": 2}, "labels is neither"),
            ({"labels": None}, "labels is neither"),
            ({"history": None}, "history is None, not text"),
        ],
    )
    def test_bad(self, change: dict[str, Any], message: str) -> None:
        assert message in reason(shp.parse, self.row | change, ShpDataConfig())


class TestSe:
    def test_all_pairs_by_score(self) -> None:
        answers = [
            {"text": f"<p>{n}</p>", "pm_score": s}
            for n, s in zip("abcd", (1, 5, 1, 3), strict=True)
        ]
        row = {"question": "<p>why?</p>", "answers": answers}
        examples = list(se.parse(row, 4, SeDataConfig()))
        prompt = "\n\nHuman: why?\n\nAssistant:"
        assert [(e.responses, e.scores) for e in examples] == [
            ((" b", " d"), (5, 3)), ((" b", " a"), (5, 1)), ((" b", " c"), (5, 1)),
            ((" d", " a"), (3, 1)), ((" d", " c"), (3, 1)),
        ]  # fmt: skip
        assert {(e.prompt, e.row) for e in examples} == {(prompt, 4)}
        capped = list(se.parse(row, 4, SeDataConfig(max_pairs_per_prompt=2)))
        assert capped == examples[:2]

    def test_nothing_to_compare(self) -> None:
        row = {"question": "q", "answers": [{"text": "a", "pm_score": 1}] * 2}
        assert reason(se.parse, row, SeDataConfig()) == "answers have no two different scores"
        assert "not a list" in reason(se.parse, row | {"answers": "a"}, SeDataConfig())
        bad = row | {"answers": [{"text": None, "pm_score": 1}]}
        assert "answers.text is None" in reason(se.parse, bad, SeDataConfig())

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("<p>One  <b>two</b>\nthree</p>\n<p>four</p>", "One two three\n\nfour"),
            ("a &lt;b&gt; &amp; &#233; <br> c", "a <b> & é \nc"),
            ("use <code>x &lt; y</code> now", "use `x < y` now"),
            (
                "<p>try</p><pre><code>if a:\n\n\n    <span>b</span>\n</code></pre><p>ok</p>",
                "try\n\n```\nif a:\n\n\n    b\n```\n\nok",
            ),
            ("<ul><li>x</li><li>y</li></ul>z", "- x\n- y\n\nz"),
            ("<script>alert(1)</script>safe<style>p{}</style>", "safe"),
            ("5 < 6 and 7 > 6", "5 < 6 and 7 > 6"),
            ("<pre>never closed", "```\nnever closed"),
        ],
    )
    def test_html(self, source: str, expected: str) -> None:
        assert se.strip_html(source, "text") == expected

    def test_unreadable_html_is_a_bad_row(self) -> None:
        row = {"question": "<![nonsense[", "answers": []}
        assert reason(se.parse, row, SeDataConfig()) in {
            "question is not readable HTML",
            "answers have no two different scores",  # newer Pythons take it for a comment
        }


class TestTldr:
    def test_marker_moves_to_the_prompt(self) -> None:
        row = {"prompt": "POST: long ", "chosen": "TL;DR: short", "rejected": " TL;DR: wrong"}
        example = only(tldr.parse(row, 0, TldrDataConfig()))
        assert example == PreferenceExample("POST: long\nTL;DR:", (" short", " wrong"), 0)

    def test_marker_already_there_or_nowhere(self) -> None:
        there = {"prompt": "P\nTL;DR:", "chosen": "TL;DR: a", "rejected": "TL;DR: b"}
        assert only(tldr.parse(there, 0, TldrDataConfig())).prompt == "P\nTL;DR:"
        nowhere = {"prompt": "P ", "chosen": "a", "rejected": "TL;DR: b"}
        kept = PreferenceExample("P ", ("a", "TL;DR: b"), 0)
        assert only(tldr.parse(nowhere, 0, TldrDataConfig())) == kept


class TestImdb:
    def test_prompt_and_response_are_the_review(self) -> None:
        counts = set()
        for n in range(200):
            review = f"w{n} a  b\tc d e f g h i j <br /><br />k"
            example = only(imdb.parse({"text": f" {review}\n"}, n, ImdbDataConfig()))
            assert isinstance(example.prompt, str)
            assert example.prompt + example.responses[0] == review
            counts.add(len(example.prompt.split()))
            again = only(imdb.parse({"text": review}, 0, ImdbDataConfig()))
            assert again.prompt == example.prompt  # whatever its row
        assert counts == set(range(2, 9))

    def test_short_review(self) -> None:
        config = ImdbDataConfig(min_prompt_words=3, max_prompt_words=3)
        assert reason(imdb.parse, {"text": "one two three"}, config) == (
            "text has 3 words, but the prompt alone 3"
        )
        assert only(imdb.parse({"text": "one two three four"}, 0, config)).responses == (" four",)


USER = {"role": "user", "content": "q"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class TestUltrafeedback:
    row: dict[str, Any] = {  # noqa: RUF012
        "prompt": "q", "messages": [], "chosen": [USER, answer("a")],
        "rejected": [USER, answer("b")], "score_chosen": 8, "score_rejected": 2.5,
    }  # fmt: skip

    def test_pair(self) -> None:
        example = only(ultrafeedback.parse(self.row, 0, UltrafeedbackDataConfig()))
        assert example == PreferenceExample([USER], ("a", "b"), 0, (8.0, 2.5))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rejected": [USER | {"content": "other"}, answer("b")]}, "a different prompt"),
            ({"chosen": [USER]}, "chosen ends with a message of role user"),
            ({"chosen": [answer("a")], "rejected": [answer("b")]}, "no message before"),
            ({"chosen": []}, "chosen is an empty list"),
            ({"chosen": [USER, "a"]}, "chosen has str instead of a message"),
            ({"chosen": [{"role": "<|im_end|>", "content": "q"}, answer("a")]}, "whose role is"),
            ({"chosen": [USER | {"content": None}, answer("a")]}, "whose content is not text"),
            ({"score_chosen": "8"}, "score_chosen is str"),
        ],
    )
    def test_bad(self, change: dict[str, Any], message: str) -> None:
        assert message in reason(ultrafeedback.parse, self.row | change, UltrafeedbackDataConfig())


class TestJsonl:
    def test_renamed_columns(self) -> None:
        config = JsonlDataConfig(prompt_field="q", chosen_field="good", rejected_field="bad")
        row = {"q": "x", "good": " y", "bad": " z", "other": 1}
        assert only(jsonl.parse(row, 3, config)) == PreferenceExample("x", (" y", " z"), 3)

    def test_demonstrations(self) -> None:
        config = JsonlDataConfig(rejected_field=None)
        row = {"prompt": "x", "chosen": "y"}
        assert only(jsonl.parse(row, 0, config)).responses == ("y",)

    def test_ranked_list_with_scores(self) -> None:
        config = JsonlDataConfig(responses_field="ranked", scores_field="s")
        row = {"prompt": "x", "ranked": ["a", "b", "c"], "s": [3, 2, 1.5]}
        assert only(jsonl.parse(row, 0, config)) == PreferenceExample(
            "x", ("a", "b", "c"), 0, (3.0, 2.0, 1.5)
        )
        assert "list of 3 scores" in reason(jsonl.parse, row | {"s": [1]}, config)
        assert "an empty list" in reason(jsonl.parse, row | {"ranked": []}, config)

    def test_which_responses_are_finished(self) -> None:
        config = JsonlDataConfig(finished_field="ended")
        row = {"prompt": "x", "chosen": "a", "rejected": "b", "ended": [False, True]}
        assert only(jsonl.parse(row, 4, config)) == PreferenceExample(
            "x", ("a", "b"), 4, None, (False, True)
        )
        assert only(jsonl.parse(row, 4, JsonlDataConfig())).finished is None
        for value, message in (
            ([True], "ended is not a list of 2 bools, one per response"),
            (True, "ended is not a list of 2 bools"),
            ([1, 0], "ended has int instead of true or false"),
            ([True, None], "ended has None instead of"),
        ):
            assert message in reason(jsonl.parse, row | {"ended": value}, config)
        with pytest.raises(DataError, match=r"no column 'ended'.*set data\.finished_field=$"):
            adapt(Rows([{"prompt": "x", "chosen": "a", "rejected": "b"}], "f", None), config, 0,
                  DropReport())  # fmt: skip

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": [USER], "chosen": "a", "rejected": "b"},
            {"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]},
            {"prompt": [USER], "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
            {"prompt": "q", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
            {"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
        ],
        ids=["texts", "answers", "conversations", "text prompt", "no prompt"],
    )
    def test_chat_rows_are_one_example(self, row: dict[str, Any]) -> None:
        expected = PreferenceExample([USER], ("a", "b"), 0)
        assert only(jsonl.parse(row, 0, JsonlDataConfig())) == expected

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "x", "chosen": "a"}, "rejected is missing"),
            ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is None, not text"),
            ({"prompt": "x", "chosen": 5, "rejected": "b"}, "chosen is int, not text"),
            ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
            (
                {"prompt": [answer("x")], "chosen": "a", "rejected": "b"},
                "message of role assistant",
            ),
            (
                {"chosen": [USER, answer("a")], "rejected": [USER, USER, answer("b")]},
                "rejected answers a different prompt",
            ),
        ],
    )
    def test_bad(self, row: dict[str, Any], message: str) -> None:
        assert message in reason(jsonl.parse, row, JsonlDataConfig())


NASTY = (
    "", " ", "\x00", "\ud800", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b",
    "<![x[", "<pre>", "&#xD800;", "TL;DR: ", "</s>", "one two three four five six seven eight nine",
)  # fmt: skip
TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(NASTY)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "x", None]), "content": TEXT}
)
ANSWER = st.fixed_dictionaries(
    {}, optional={"text": TEXT | st.none(), "pm_score": st.integers(-2, 3) | st.none()}
)
VALUE = st.one_of(
    TEXT, TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=2),
    st.lists(TEXT, max_size=3), st.lists(MESSAGE, max_size=3), st.lists(ANSWER, max_size=3),
    st.lists(st.booleans(), max_size=3),
)  # fmt: skip
COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "history",
    "human_ref_A",
    "human_ref_B",
    "score_A",
    "score_B",
    "labels",
    "question",
    "answers",
    "text",
    "score_chosen",
    "score_rejected",
    "ranked",
    "ended",
]
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, VALUE))
RANKED = JsonlDataConfig(responses_field="ranked", scores_field="answers")
ENDED = JsonlDataConfig(finished_field="ended")


@settings(max_examples=400, deadline=None)
@given(row=ROWS)
def test_any_row_is_read_or_refused(row: dict[str, Any]) -> None:
    configs = [schema() for name, schema in DATA_SCHEMAS.items() if name in ADAPTERS]
    for config in [*configs, RANKED, ENDED, HhDataConfig(chat_template="always")]:
        try:
            examples = list(ADAPTERS[config.name](row, 5, config))
        except BadRow:
            continue
        for example in examples:
            assert example.row == 5
            assert example.responses
            assert all(type(r) is str for r in example.responses)
            assert example.scores is None or len(example.scores) == len(example.responses)
            assert example.finished is None or len(example.finished) == len(example.responses)


def test_report_shows_five_rows_and_keeps_all() -> None:
    drops = DropReport(read=1234)
    for row in range(7):
        drops.add("chosen is blank", row)
    drops.add("text is None, not text", 99)
    drops.add_truncated("prompt (data.max_prompt_length=8)", 3)
    held = DropReport(read=10, dropped={"chosen is blank": [4]})
    drops.absorb(held, "eval split: ")
    assert drops.dropped["chosen is blank"] == list(range(7))
    assert drops.summary_lines() == [
        "dropped 7 of 1,244 rows: chosen is blank (rows 0, 1, 2, 3, 4 and 2 more)",
        "dropped 1 of 1,244 rows: text is None, not text (row 99)",
        "dropped 1 of 1,244 rows: eval split: chosen is blank (row 4)",
        "truncated 1 of 1,244 rows: prompt (data.max_prompt_length=8) (row 3)",
    ]
