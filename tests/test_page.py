"""report.html: harmless, whole, readable without a network and without eyes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from itertools import pairwise

import pytest

from page_runs import HOSTILE, POINTS, Page, dpo_run, evaluation, jsonl, recipe_report, report
from small_runs import train


@pytest.fixture
def pages(tmp_path) -> list[Page]:
    """One of each kind, with hostile text wherever text can come in."""
    samples = [{"step": 0, "prompt": HOSTILE, "completion": HOSTILE + "W" * 400}]
    evil = {"stage": {"name": "dpo", "loss": "sigmoid", HOSTILE: HOSTILE},
            "model": {"path": f"runs/{HOSTILE}"}, "data": {"name": HOSTILE}}  # fmt: skip
    one = dpo_run(tmp_path / "one", config=evil, samples=samples)
    (one / "command.txt").write_text(HOSTILE)
    points = [{**row, "setting": HOSTILE} for row in POINTS]
    rates = json.dumps([{"policy": HOSTILE, "opponent": HOSTILE, "win_rate": 0.5, "wins": 1}])
    two = evaluation(
        tmp_path / "r" / "01-evaluate", 0.5, samples=samples, points_jsonl=jsonl(points)
    )
    (two / "win_rates.json").write_text(rates)
    three = dpo_run(tmp_path / "r" / "02-dpo", samples=samples)
    of_recipe = recipe_report(
        tmp_path / "r", [two, three], description=HOSTILE, vars={HOSTILE: HOSTILE}
    )
    return [report(one, fingerprint=HOSTILE), report(two), of_recipe]


def test_nothing_is_loaded_and_nothing_runs(pages):
    for page in pages:
        assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & {
            name for name, _ in page.elements
        }
        for name, attributes in page.elements:
            assert not [a for a in attributes if a.startswith("on") or a in ("style", "href")], name
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png")


def test_the_policy_allows_this_page_and_no_more(pages):
    for page in pages:
        (style,) = re.findall("<style>(.*?)</style>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policies = [
            m["content"]
            for m in page.all("meta")
            if m.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policies == [
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'"
        ]
        assert "url(" not in style
        assert "@import" not in style


def test_hostile_text_is_only_text(pages):
    for page in pages:
        assert "<script>alert(1)</script> {{7*7}} {% raw %} \"double\" 'single' &amp;" in page.text
        assert "\\x1b[31mred \\u202eevil\\u202c nul\\x00 </style></p><img src=x" in page.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
        assert len(page.all("style")) == 1


def test_lone_surrogates_do_not_break_the_file(tmp_path):
    folder = dpo_run(tmp_path / "r", samples=[{"prompt": "half \ud800", "completion": "\udfff"}])
    assert "half \\ud800" in report(folder).text


def test_head_and_headings(pages):
    for page in pages:
        assert page.all("html") == [{"lang": "en"}]
        metas = page.all("meta")
        assert metas[0] == {"charset": "utf-8"}
        assert page.source.index('charset="utf-8"') < 1024  # where browsers look for it
        named = {m["name"]: m["content"] for m in metas if "name" in m}
        assert named["viewport"] == "width=device-width, initial-scale=1"
        assert named["referrer"] == "no-referrer"
        assert page.texts["title"][0].strip()
        levels = [int(n[1]) for n, _ in page.elements if re.fullmatch("h[1-6]", n)]
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tables_and_pictures_can_be_heard(pages):
    for page in pages:
        assert page.all("table")
        assert len(page.all("caption")) == len(page.all("table"))
        assert {a.get("scope") for a in page.all("th")} == {"col", "row"}
        for image in page.all("img"):
            assert len(image["alt"]) > 40
            assert re.search(r"\d", image["alt"])
            assert int(image["width"]) * 150 == 300 * 96  # pixels of CSS, of a file of 150 dpi


def test_pictures_are_the_files(tmp_path):
    folder = dpo_run(tmp_path / "r")
    (image,) = report(folder).all("img")  # loss.png is in overview.png, too
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
    assert png == (folder / "plots" / "overview.png").read_bytes()
    assert image["alt"] == (
        "Curves over 40 training steps; loss from 0.693 to 0.500; held-out loss from 0.693 to "
        "0.612; held-out preference accuracy from 50.0% to 73.1%."
    )


def test_long_texts_and_many_samples_are_cut(tmp_path):
    samples = [{"prompt": f"P{n}", "completion": "x" * 2000, "reward": 0.5} for n in range(100)]
    page = report(evaluation(tmp_path / "r", 0.5, samples=samples))
    assert page.text.count("(2,000 characters)") == 40
    assert re.findall("x{500,}", page.text) == ["x" * 600] * 40
    assert "The first 40 of 100, not selected." in page.text
    assert len(page.source) < 100_000


def test_secrets_and_the_home_folder_stay_out(tmp_path, monkeypatch):
    secret = 'very"secret\\token-of-mine'
    monkeypatch.setenv("MY_API_KEY", secret)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    samples = [{"prompt": f"say {secret}", "completion": "hf_" + "a1" * 15}]
    folder = dpo_run(tmp_path / "home" / "r", samples=samples)
    (folder / "command.txt").write_text(f"dpo-run x={secret} run_dir={folder}\n")
    source = report(folder).source
    assert "say [redacted]" in source
    assert "token-of-mine" not in source
    assert "hf_a1" not in source
    assert "run_dir=~/r" in source
    assert str(tmp_path) not in source


def test_what_is_missing_or_torn_is_left_out(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "The run left no figures." in report(tmp_path / "empty").text
    folder = dpo_run(tmp_path / "r")
    (folder / "summary.json").write_text("[1, 2")
    (folder / "config.yaml").write_text("stage: {")
    (folder / "plots" / "overview.png").write_bytes(b"\x89PNG")
    (folder / "win_rates.json").write_text('{"a": 1}')
    (folder / "samples.jsonl").write_bytes(b'[1]\n{"prompt": "p", "completion": "c"}\n{"pro\xff')
    page = report(folder)
    assert not page.all("img")
    assert page.text.count("Completions") == 1


def test_a_run_writes_its_report(tmp_path, capsys):
    words = ("stage=sft", "train.max_steps=2", "logger.progress=plain")
    train(tmp_path / "r", *words, "logger.plots=true")
    page = Page(tmp_path / "r" / "report.html")
    assert page.texts["h1"] == ["Supervised fine-tuning of tiny on sentiment"]
    assert "After 2 steps on 48 examples: held-out loss" in page.text
    assert len(page.all("img")) == 1
    assert f"report: {tmp_path / 'r' / 'report.html'}" in capsys.readouterr().err
    train(tmp_path / "off", *words, "logger.report=false")
    assert not (tmp_path / "off" / "report.html").exists()
