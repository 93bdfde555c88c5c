"""Rewards without a model: numbers worked by hand, and word lists that cannot be used."""

import math
import zipfile

import pytest

from dpo_cli.errors import ConfigError, DataError, NonFiniteError
from dpo_cli.grammar import positive_probability
from dpo_cli.rewards.lexicon import MAX_BYTES, from_lists, mean_valence, read_lexicon
from dpo_cli.rewards.scorers import Completed
from scoring_helpers import scorer, texts


def test_pure_rewards_by_hand(tmp_path):
    rows = texts(" a fine film .", "", prompt="I saw")
    assert scorer(tmp_path, "reward_fn=length")(rows) == [4.0, 0.0]
    p = positive_probability("I saw a fine film .")
    assert scorer(tmp_path)(rows)[0] == p
    odds = scorer(tmp_path, "reward_fn.scale=log_odds")(rows)[0]
    assert odds == pytest.approx(math.log(p / (1 - p)), abs=1e-9)


def test_lexicon_by_hand(tmp_path):
    lists = ("reward_fn=lexicon", "reward_fn.positive=[good,Great]", "reward_fn.negative=[bad]")
    score = scorer(tmp_path, *lists)
    rows = texts("GOOD, good... and (bad)!", "great", "- , !", "", "neither", "“good”")
    assert score(rows) == [(1 + 1 + 0 - 1) / 4, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert score([Completed("bad bad bad", "good")]) == [1.0]  # the prompt is not rated


def test_a_file_of_valences(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("good\t1.9\t0.9\t[2, 1]\r\n\nSo\t-3\nso\t-0.5\nSO\t7\n:)\t2.0\nit's ok\t1\n")
    table = read_lexicon(path)
    assert table == {"good": 1.9, "so": -0.5, ":)": 2.0, "it's ok": 1.0}
    with zipfile.ZipFile(tmp_path / "words.zip", "w") as archive:
        archive.write(path, "folder/words.txt")
    assert read_lexicon(tmp_path / "words.zip") == table
    score = scorer(tmp_path, "reward_fn=lexicon", f"reward_fn.path={tmp_path / 'words.zip'}")
    assert score(texts("So good :) !")) == [pytest.approx((-0.5 + 1.9 + 2.0) / 3)]


def test_valences_that_overflow_are_no_score(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("good\t1e308\n")
    score = scorer(tmp_path, "reward_fn=lexicon", f"reward_fn.path={path}")
    assert score(texts("good")) == [1e308]
    with pytest.raises(NonFiniteError, match="a score is not finite"):
        score(texts("good", "good good"))


def test_a_word_list_has_a_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "words.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("words.txt", b"good\t1\n" * (MAX_BYTES // 7 + 1))
    with pytest.raises(DataError, match="more than 64 MB of words"):
        read_lexicon(tmp_path / "words.zip")


def test_vader(shared):
    table = read_lexicon(shared / "data" / "sentiment" / "vader_lexicon.zip")
    assert len(table) > 7000
    assert (table["good"], table["horrible"], table[":)"]) == (1.9, -2.5, 2.0)
    assert mean_valence("A good, GOOD film", table) == pytest.approx(1.9 * 2 / 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\t1\nbad\n", r"words\.txt:2: not a line `word<TAB>valence`: 'bad'$"),
        (b"good\tnan\n", r"words\.txt:1: not a line"),
        (b"good 1\n", r"words\.txt:1: not a line"),
        (b"\t1\n", r"words\.txt:1: not a line"),
        (b"\n", r"reward_fn\.path=\S+: contains no words"),
        (b"\xff\xfe", r"reward_fn\.path=\S+: cannot be read: "),
    ],
)
def test_bad_word_lists(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_lexicon(path)


def test_bad_lists_and_archives(tmp_path):
    with pytest.raises(ConfigError, match=r"^reward_fn=lexicon: no words; set reward_fn\.path"):
        from_lists([], [])
    with pytest.raises(
        ConfigError, match=r"^reward_fn\.negative: 'fun' is also in reward_fn\.positive"
    ):
        from_lists(["Fun"], ["fun"])
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"^reward_fn\.path=\S+: cannot be read: "):
        read_lexicon(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"^reward_fn\.path=\S+: contains 0 \.txt files"):
        read_lexicon(tmp_path / "b.zip")
