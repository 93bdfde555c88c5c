"""Rows through templates of many families, against `apply_chat_template` of the whole talk."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import ENDS, TEMPLATES, tokenizer
from dpo_cli.config import HhDataConfig, JsonlDataConfig
from dpo_cli.data.adapters import jsonl
from dpo_cli.data.chat import turn_end
from dpo_cli.data.dataset import load_encoded, load_splits
from dpo_cli.data.drops import BadRow, DropReport
from dpo_cli.data.encode import encode_completed, encode_examples
from dpo_cli.data.limits import Limits
from dpo_cli.data.part import for_tokenizer
from dpo_cli.data.template import Renderer
from dpo_cli.errors import ConfigError
from dpo_cli.records import EncodedExample
from dpo_cli.rewards.completions import as_read_by
from dpo_cli.rewards.scorers import Completed

WIDE = Limits(4096, 2048)
ASK = [{"role": "user", "content": "Two plus two?"}]
TALK = [*ASK, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Why?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
REFUSE_SYSTEM = ("Mistral", "Gemma")
DAY = "2026-01-31"
RAIN = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def encoded(
    family: str, row: dict[str, Any], drops: DropReport | None = None, **config: Any
) -> list[EncodedExample]:
    settings = JsonlDataConfig(date=DAY, **config)
    examples = list(jsonl.parse(row, 0, settings))
    report = drops if drops is not None else DropReport()
    return encode_examples(examples, tokenizer(family), settings, WIDE, report)


def one(family: str, row: dict[str, Any], **config: Any) -> tuple[str, list[str]]:
    """Prompt and responses as text, each of one row."""
    (example,) = encoded(family, row, **config)
    texts = [tokenizer(family).decode(ids) for ids in (example.prompt_ids, *example.response_ids)]
    return texts[0], texts[1:]


def rendered(family: str, messages: list[Any], opened: bool = False, **variables: Any) -> str:
    """The oracle: transformers' own rendering, with the day filled in."""
    of = tokenizer(family)
    day = datetime.date.fromisoformat(DAY).strftime("%d %b %Y")
    of.chat_template = TEMPLATES[family].replace("strftime_now('%d %b %Y')", f"'{day}'")
    return of.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opened, **variables
    )  # fmt: skip


def dropped(family: str, row: dict[str, Any], **config: Any) -> list[str]:
    drops = DropReport()
    assert encoded(family, row, drops, **config) == []
    return list(drops.dropped)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("talk", [ASK, TALK])
def test_prompt_and_response_are_the_rendering(family: str, system: bool, talk: list[Any]) -> None:
    if system and family in REFUSE_SYSTEM:
        row = {"prompt": [SYSTEM, *talk], "chosen": "Four.", "rejected": "Five."}
        assert "is rejected by the chat template" in dropped(family, row)[0]
        return
    talk = [SYSTEM, *talk] if system else talk
    prompt, responses = one(family, {"prompt": talk, "chosen": "It is four.", "rejected": "No."})
    for text, response in zip(("It is four.", "No."), responses, strict=True):
        whole = rendered(family, [*talk, answer(text)])
        assert whole.startswith(prompt + response)
        assert whole[len(prompt + response) :].strip() == ""
        assert response.count(text) == 1
        assert response.endswith(ENDS.get(family, "</s>"))
    opened = rendered(family, talk, opened=True)
    assert opened.startswith(prompt)
    if family != "DeepSeek-R1":  # whose answers do not continue its generation prompt
        assert opened == prompt


@pytest.mark.parametrize("family", TEMPLATES)
def test_completions_start_behind_the_prompt_of_training(family: str) -> None:
    """What is sampled behind a row's prompt is scored behind the same tokens."""
    of, config = tokenizer(family), JsonlDataConfig(date=DAY)
    (trained,) = encoded(family, {"prompt": TALK, "chosen": "It is.", "rejected": "No."})
    (scored,) = encode_completed([(TALK, "It is.", True)], of, config, WIDE, DropReport())
    assert scored.prompt_ids.tolist() == trained.prompt_ids.tolist()
    if not family.startswith("Qwen 3"):  # which writes a think block that a completion brings
        assert scored.response_ids[0].tolist() == trained.response_ids[0].tolist()


THOUGHT = "<think>\nI add them.\n</think>\n\nFour."


class TestThinking:
    @pytest.mark.parametrize("family", ["Qwen 3", "Qwen 3 thinking"])
    def test_one_block_of_either_writing(self, family: str) -> None:
        row = {"prompt": ASK, "chosen": THOUGHT, "rejected": "<think>\nHm.\n</think>\n\nFive."}
        prompt, (chosen, rejected) = one(family, row)
        assert prompt == rendered(family, ASK, opened=True)
        assert (prompt + chosen).count("<think>") == (prompt + rejected).count("<think>") == 1
        assert prompt + chosen == rendered(family, [*ASK, answer(THOUGHT)])[:-1]
        apart = {
            "prompt": ASK,
            "chosen": [answer("Four.", reasoning_content="I add them.")],
            "rejected": [answer("Five.", reasoning_content="Hm.")],
        }
        assert one(family, apart) == (prompt, [chosen, rejected])

    def test_thinking_off_is_of_the_prompt(self) -> None:
        row = {"prompt": ASK, "chosen": "Four.", "rejected": "Five."}
        prompt, (chosen, _) = one("Qwen 3", row, chat_template_kwargs={"enable_thinking": False})
        assert prompt == rendered("Qwen 3", ASK, opened=True, enable_thinking=False)
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert chosen == "Four.<|im_end|>"
        prompt, (chosen, _) = one("Qwen 3", row)
        assert prompt.endswith("assistant\n")
        assert chosen == "<think>\n\n</think>\n\nFour.<|im_end|>"

    @pytest.mark.parametrize("content", [THOUGHT, "Four."])
    def test_reasoning_that_the_template_cuts_out_drops_the_row(self, content: str) -> None:
        message = answer(content) if content == THOUGHT else answer(content, reasoning_content="Hm")
        row = {"prompt": ASK, "chosen": [message], "rejected": "Five."}
        (why,) = dropped("DeepSeek-R1", row)
        assert why.startswith("chosen is rendered by the chat template without its ")

    def test_a_second_block_drops_the_row(self) -> None:
        of = tokenizer("ChatML")
        of.chat_template = of.chat_template.replace(
            "{{ m.content }}",
            "{{ '<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' }}{{ m.content }}",
        )
        settings = JsonlDataConfig()
        row = {"prompt": ASK, "chosen": THOUGHT, "rejected": "Five."}
        drops = DropReport()
        assert not encode_examples(list(jsonl.parse(row, 0, settings)), of, settings, WIDE, drops)
        assert "chosen has a think block in addition to that of the chat template" in drops.dropped


class TestTools:
    HISTORY = (
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3 mm", "name": None, "tool_call_id": "1"},
    )

    def test_calls_and_tools_reach_the_template(self) -> None:
        row = {"tools": [RAIN], "prompt": list(self.HISTORY), "chosen": "Yes.", "rejected": "No."}
        prompt, _ = one("Llama 3.1", row)
        plain = [
            dict(self.HISTORY[0]),
            answer("", tool_calls=[CALL]),
            {"role": "tool", "content": "3 mm"},
        ]
        assert prompt == rendered("Llama 3.1", plain, opened=True, tools=[RAIN])
        assert '"arguments": {"town": "Ulm"}' in prompt

    def test_arguments_and_tools_as_json_text(self) -> None:
        import json

        text = {"type": "function", "function": {"name": "rain", "arguments": '{"town": "Ulm"}'}}
        history = [self.HISTORY[0], answer("", tool_calls=[text]), self.HISTORY[2]]
        row = {"tools": json.dumps([RAIN]), "prompt": history, "chosen": "Yes.", "rejected": "No."}
        same = row | {"tools": [RAIN], "prompt": list(self.HISTORY)}
        assert one("Llama 3.1", row) == one("Llama 3.1", same)

    def test_an_answer_that_is_a_call(self) -> None:
        row = {"tools": [RAIN], "prompt": ASK, "chosen": [answer("", tool_calls=[CALL])],
               "rejected": "Maybe."}  # fmt: skip
        prompt, (chosen, rejected) = one("Llama 3.1", row)
        whole = rendered("Llama 3.1", [*ASK, row["chosen"][0]], tools=[RAIN])
        assert prompt + chosen == whole
        assert chosen.endswith("<|im_end|>")  # the end that the template gives to calls
        assert rejected == "Maybe.<|eot|>"

    @pytest.mark.parametrize("family", ["ChatML", "Gemma", "Phi"])
    def test_a_template_without_tools_drops_the_row(self, family: str) -> None:
        row = {"prompt": ASK, "chosen": "Yes.", "rejected": "No."}
        assert dropped(family, row | {"tools": [RAIN]}) == [
            "tools are left out by the chat template"
        ]
        assert dropped(family, row | {"prompt": list(self.HISTORY)}) == [
            "prompt is rendered by the chat template without its tool_calls"
        ]
        assert encoded(family, row | {"tools": None})

    @pytest.mark.parametrize(
        ("calls", "why"),
        [
            ({"name": "rain"}, "has .* instead of a list of tool calls"),
            ([{"function": "rain", "arguments": {}}], "has a tool call without a function's name"),
        ],
    )
    def test_a_call_that_is_none(self, calls: Any, why: str) -> None:
        row = {"prompt": ASK, "chosen": [answer("", tool_calls=calls)], "rejected": "No."}
        with pytest.raises(BadRow, match=why):
            encoded("Llama 3.1", row)


class TestDates:
    def test_a_run_has_one_day(self) -> None:
        row = {"prompt": ASK, "chosen": "Yes.", "rejected": "No."}
        assert "Today Date: 31 Jan 2026" in one("Llama 3.1", row)[0]

    def test_without_one_it_is_today(self) -> None:
        today = datetime.date.today().strftime("%d %b %Y")
        assert today in Renderer(tokenizer("Llama 3.1"))(ASK)


class TestContent:
    def test_text_parts_are_one_text(self) -> None:
        parts = [{"type": "text", "text": "Two plus"}, {"type": "text", "text": " two?"}]
        row = {"chosen": "Four.", "rejected": "No."}
        split = row | {"prompt": [{"role": "user", "content": parts}]}
        assert one("ChatML", split) == one("ChatML", row | {"prompt": ASK})
        image = row | {"prompt": [{"role": "user", "content": [{"type": "image"}, *parts]}]}
        with pytest.raises(BadRow, match="part of type image"):
            encoded("ChatML", image)

    @pytest.mark.parametrize("write", [str, __import__("json").dumps])
    def test_messages_written_as_text(self, write: Any) -> None:
        row = {"prompt": ASK, "chosen": [answer("Four.")], "rejected": [answer("No.")]}
        text = {name: write(value) for name, value in row.items()}
        assert one("ChatML", text) == one("ChatML", row)

    def test_messages_that_no_one_can_read(self) -> None:
        broken = "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"
        with pytest.raises(BadRow, match="neither valid JSON nor Python"):
            encoded("ChatML", {"prompt": broken, "chosen": "a", "rejected": "b"})

    def test_a_prompt_text_beside_its_conversation(self) -> None:
        row = {"prompt": "Two plus two?", "chosen": [SYSTEM, *ASK, answer("Four.")],
               "rejected": [SYSTEM, *ASK, answer("No.")]}  # fmt: skip
        wanted = one("ChatML", {"prompt": [SYSTEM, *ASK], "chosen": "Four.", "rejected": "No."})
        assert one("ChatML", row) == one("ChatML", row | {"prompt": None}) == wanted
        assert one("ChatML", row, prompt_field=None) == wanted
        turns = [*ASK, answer("Four."), {"role": "user", "content": "Why?"}, answer("So.")]
        with pytest.raises(BadRow, match="has several turns"):
            encoded("ChatML", {"prompt": ASK, "chosen": turns[1:], "rejected": turns[1:]})

    def test_ranked_responses_are_ordered_by_score(self) -> None:
        row = {"prompt": ASK, "responses": ["Five.", "Four.", "Six."], "scores": [1, 9, 1]}
        _, found = one("ChatML", row, responses_field="responses", scores_field="scores")
        assert [text.partition("<")[0] for text in found] == ["Four.", "Five.", "Six."]


class TestTextsOfATemplate:
    ROW = {  # noqa: RUF012
        "prompt": "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "Four.<|im_end|>\n", "rejected": "Five.<|im_end|>",
    }  # fmt: skip

    def test_they_are_noticed(self) -> None:
        drops = DropReport()
        assert encoded("ChatML", self.ROW, drops)
        (line,) = drops.summary_lines()
        assert "special tokens such as <|im_start|>" in line
        assert "data.special_tokens=parse" in line

    def test_parsed_they_are_the_messages(self) -> None:
        drops = DropReport()
        (parsed,) = encoded("ChatML", self.ROW, drops, special_tokens="parse")
        (chat,) = encoded("ChatML", {"prompt": ASK, "chosen": "Four.", "rejected": "Five."})
        assert parsed.prompt_ids.tolist() == chat.prompt_ids.tolist()
        for got, wanted in zip(parsed.response_ids, chat.response_ids, strict=True):
            assert got.tolist() == wanted.tolist()


def test_a_row_that_a_template_trips_over_is_dropped() -> None:
    of, settings = tokenizer("ChatML"), JsonlDataConfig()
    of.chat_template = (
        "{% if messages[0].content == 'Hm?' %}{{ 1 + 'a' }}{% endif %}" + TEMPLATES["ChatML"]
    )
    rows = [{"prompt": [{"role": "user", "content": text}], "chosen": "Yes.", "rejected": "No."}
            for text in ("Hm?", "Ah?")]  # fmt: skip
    examples = [e for i, row in enumerate(rows) for e in jsonl.parse(row, i, settings)]
    drops = DropReport()
    assert [e.row for e in encode_examples(examples, of, settings, WIDE, drops)] == [1]
    (why,) = drops.dropped
    assert why.startswith("prompt is rejected by the chat template (unsupported operand")


def test_templates_without_a_default_end_no_turn() -> None:
    """Texts can be sampled from such a tokenizer nonetheless."""
    of = tokenizer("ChatML")
    assert turn_end(of) == of.convert_tokens_to_ids("<|im_end|>")
    of.chat_template = {"rag": TEMPLATES["ChatML"]}
    assert turn_end(of) is None


def test_a_template_of_ones_own(tmp_path: Any) -> None:
    """A file in place of a missing template; without it, chat rows are refused."""
    from dpo_cli.data.template import use_template_file

    row = {"prompt": ASK, "chosen": "Four.", "rejected": "Five."}
    of = tokenizer("ChatML")
    of.chat_template = None
    examples = list(jsonl.parse(row, 0, JsonlDataConfig()))
    with pytest.raises(ConfigError, match="human_assistant"):
        encode_examples(examples, of, JsonlDataConfig(), WIDE, DropReport())
    (tmp_path / "t.jinja").write_text(TEMPLATES["ChatML"])
    config = JsonlDataConfig(chat_template=str(tmp_path / "t.jinja"))
    use_template_file(of, config)
    (example,) = encode_examples(examples, of, config, WIDE, DropReport())
    (wanted,) = encoded("ChatML", row)
    assert example.prompt_ids.tolist() == wanted.prompt_ids.tolist()


@pytest.mark.parametrize("family", ["ChatML", None])
def test_hh_is_messages_for_a_model_with_a_template(tmp_path: Path, family: str | None) -> None:
    """Else the text as the data set has it: an instruct model would never end its turn."""
    said = "\n\nHuman: Two plus two?\n\nAssistant:"
    rows = [{"chosen": f"{said} Four {i}.", "rejected": f"{said} No."} for i in range(3)]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = tokenizer(family or "ChatML")
    if family is None:
        of.chat_template = None
    config = HhDataConfig(path=str(tmp_path / "hh.jsonl"))
    example = load_encoded(config, of, 256, 0, None).train[1]
    prompt, chosen = (of.decode(ids) for ids in (example.prompt_ids, example.response_ids[0]))
    if family is None:
        assert (prompt, chosen) == (said, " Four 1.</s>")
    else:
        assert prompt == rendered(family, ASK, opened=True)
        assert chosen == "Four 1.<|im_end|>"


@pytest.mark.parametrize("reader", ["ChatML", None])
@pytest.mark.parametrize("writer", ["ChatML", None])
def test_each_model_reads_hh_in_its_own_form(
    tmp_path: Path, writer: str | None, reader: str | None
) -> None:
    """A completion has the ids that the row has which says the same, as the reader was trained."""
    said = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Two plus two?\n\nAssistant:"
    row = {"chosen": f"{said} Four.", "rejected": f"{said} No."}
    (tmp_path / "hh.jsonl").write_text(json.dumps(row) + "\n")
    config = HhDataConfig(path=str(tmp_path / "hh.jsonl"))
    forms = {}
    for family in (writer, reader):
        forms[family] = tokenizer("ChatML")
        if family is None:
            forms[family].chat_template = None
    adapted = for_tokenizer(config, forms[writer])
    (example,) = load_splits(adapted, 0).train
    ours = Completed(example.prompt, "Four." if writer else " Four.", finished=True)
    settings, texts = as_read_by(forms[reader], config, [ours])
    (got,) = encode_completed([(*texts[0], True)], forms[reader], settings, WIDE, DropReport())
    (wanted,) = load_encoded(config, forms[reader], 256, 0, None).train
    assert got.prompt_ids.tolist() == wanted.prompt_ids.tolist()
    assert got.response_ids[0].tolist() == wanted.response_ids[0].tolist()
