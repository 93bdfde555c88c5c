"""Judging by reward, the paper's questions, how answers are read, whom to ask."""

import time

import pytest

from dpo_cli.config.endpoint import Endpoint, endpoint_from_environment
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation.judge import Match, RewardJudge
from dpo_cli.evaluation.judge_prompts import MAX_SHOWN, parse_choice, question
from dpo_cli.rewards.scorers import Completed, length
from judge_server import KEY


def match(ours, theirs):
    return Match(Completed("Which?", ours), Completed("Which?", theirs))


# ---------------------------------------------------------------- by reward


def test_the_higher_reward_wins():
    judge = RewardJudge(length, "reward_fn=length")
    ticks = []
    games = [match("one two", "one"), match("one", "one two"), match("one two", "three four")]
    assert [d.verdict for d in judge(games, ticks.append)] == ["win", "loss", "tie"]
    assert sum(ticks) == 3
    broken = RewardJudge(lambda rows: [float("nan")] + [1.0] * (len(rows) - 1), "broken")
    assert [d.verdict for d in broken(games, ticks.append)] == ["error", "tie", "tie"]


# ---------------------------------------------------------------- the question


def test_questions_are_the_papers():
    text = question("summary", "SUBREDDIT: r/a\nPOST: {b} is {0}\nTL;DR:", " One.", " Two. ")
    assert text.startswith(
        "Which of the following summaries does a better job of summarizing the most important "
        "points in the given forum post, without including unimportant or irrelevant details? A "
        "good summary is both precise and concise.\n\nPost:\nSUBREDDIT: r/a\nPOST: {b} is {0}\n\n"
        "Summary A:\nOne.\n\nSummary B:\nTwo.\n\nFIRST provide a one-sentence comparison of the "
        "two summaries, explaining which you prefer and why. SECOND, on a new line, state only "
        '"A" or "B" to indicate your choice.'
    )
    assert text.endswith(
        "\nComparison: <one-sentence comparison and explanation>\n"
        'Preferred: <"A" or "B">'
    )  # fmt: skip
    text = question("dialogue", "\n\nHuman: Hi {a}?\n\nAssistant:", "x", "y")
    assert text.startswith(
        "For the following query to a chatbot, which response is more helpful?\n\nQuery: Hi {a}?"
        "\n\nResponse A:\nx\n\nResponse B:\ny\n\nFIRST provide a one-sentence comparison of the "
        "two responses and explain which you feel is more helpful. SECOND, on a new line, state "
        'only "A" or "B" to indicate which response is more helpful.'
    )
    assert text.endswith('\nMore helpful: <"A" or "B">')
    assert "more positive" in question("sentiment", "The film", " x", " y")


def test_a_judge_is_not_sent_a_text_without_end():
    prompt, answer = "start" + "x" * 10**6 + "end", "first" + "y" * 10**6
    text = question("dialogue", prompt, answer, "b")
    assert len(text) < 2.1 * MAX_SHOWN
    assert "xend\n\nResponse A:\nfirstyy" in text
    assert "start" not in text


def test_dialogues_of_several_turns_keep_their_roles():
    turns = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    assert "Query: Human: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nR" in question(
        "dialogue", turns, "x", "y"
    )
    said = lambda role, text: {"role": role, "content": text}  # noqa: E731
    assert "Query: Why?\n\nR" in question("dialogue", [said("user", "Why?")], "x", "y")
    talk = [said("system", "Be kind"), said("user", "Why?")]
    assert "Query: System: Be kind\n\nUser: Why?\n\nR" in question("dialogue", talk, "x", "y")


# ---------------------------------------------------------------- the answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Comparison: A says more than B.\nPreferred: A", "A"),
        ("Comparison: fine\nMore helpful: B", "B"),
        ("more helpful: b", "B"),
        ('PREFERRED: "B".', "B"),
        ("**Preferred:** B", "B"),
        ("**Preferred**: **A**.", "A"),
        ("Preferred: Summary A", "A"),
        ("> More helpful: `Response B`", "B"),
        ("Preferred: <B>", "B"),
        ("Comparison: A is short. Preferred: B", "B"),
        ("Preferred: A\nOn second thoughts:\nPreferred: B", "B"),
        ("Comparison: the text says 'Preferred: B' itself.\r\nPreferred: A\r\n", "A"),
        ("Preferred: \x1b[1;31mA\x1b[0m", "A"),
        ("Comparison: B is better.\nB", "B"),
        ('{"comparison": "A or B", "preferred": "A"}', "A"),
        ('{"More Helpful": "b"}', "B"),
        ('```json\n{"choice": "B", "why": "x"}\n```', "B"),
        ('{"winner": "Response A"}', "A"),
        ('Here it is:\n{"preferred": "B"}', "B"),
        ("", None),
        ("I cannot decide.", None),
        ("A is better than B", None),
        ("Preferred: A or B", None),
        ('Preferred: <"A" or "B">', None),
        ("Preferred: both", None),
        ("Preferred: C", None),
        ("Preferred: \u0410", None),  # Cyrillic
        ("Preferred:", None),
        ("Preferred: A\nPreferred: neither", None),
        ('{"preferred": "A", "winner": "B"}', None),
        ('{"preferred": ["A"]}', None),
        ('{"answer": 1}', None),
        ("{" * 5000, None),
        ('{"preferred":' + "[" * 5000, None),
        ("Preferred: " + "* " * 3990, None),
    ],
)
def test_what_an_answer_decides(answer, letter):
    began = time.monotonic()
    assert parse_choice(answer) == letter
    assert time.monotonic() - began < 0.5  # no expression that backtracks for ever


# ---------------------------------------------------------------- the address
def test_whom_to_ask(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^judge=http: .*OPENAI_BASE_URL=.*OPENAI_API_KEY"):
        endpoint_from_environment()
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert endpoint_from_environment() == Endpoint("https://api.openai.com/v1", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1/")
    assert endpoint_from_environment().url == "http://localhost:8000/v1/chat/completions"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert endpoint_from_environment() == Endpoint("http://localhost:8000/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://h/v1/chat/completions")
    assert endpoint_from_environment().url == "https://h/v1/chat/completions"


@pytest.mark.parametrize(
    "base",
    ["localhost:8000", "ftp://h/v1", "http://", "http://h:port/v1", "http://[h", "http://a b/",
     "http://a..b/v1", "http://me:hunter22@h/v1", "https://h/v1?key=hunter22", "http://h/\nhunter22"],
)  # fmt: skip
def test_addresses_that_cannot_be_used_are_not_shown(monkeypatch, base):
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    with pytest.raises(ConfigError, match=r"^OPENAI_BASE_URL: ") as caught:
        endpoint_from_environment()
    assert "hunter22" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["sk-two words", "sk-line\nbreak", "sk-\u00fcmlaut"])
def test_a_key_that_no_header_can_carry(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match=r"^OPENAI_API_KEY: contains spaces") as caught:
        endpoint_from_environment()
    assert "sk-" not in str(caught.value)
