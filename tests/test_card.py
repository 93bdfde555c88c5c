"""The model card: valid metadata, true facts, nothing private, nothing executable."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from dpo_cli.report.card import write_model_card

FACTS = {
    "stage": "dpo",
    "name": "sentiment-dpo",
    "model": {"hub_id": "openai-community/gpt2", "revision": "607a30d"},
    "data": {"name": "hh", "hub_id": "Anthropic/hh-rlhf", "fingerprint": "00ff", "path": None},
    "command": ["dpo-run", "data=hh", "run_dir=a b"],
    "config": {"stage": {"loss": "sigmoid", "beta": 0.1}, "optim": {"lr": 1e-6}},
    "results": {"eval/loss": 0.612345, "eval/rewards/accuracies": None},
    "versions": {"torch": "2.13.0"},
}


def card(folder, **changes):
    write_model_card(folder, FACTS | changes)
    return (folder / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_hub_reads_the_metadata(tmp_path):
    card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "openai-community/gpt2",
        "datasets": ["Anthropic/hh-rlhf"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "dpo-run"],
        "generated_from": "dpo-run",
    }


def test_facts_are_in_the_text(tmp_path):
    text = card(tmp_path)
    assert "| eval/loss | 0.6123 |" in text
    assert "eval/rewards/accuracies" not in text  # unknown
    assert "| fingerprint | 00ff |" in text
    assert "openai-community/gpt2 (revision 607a30d) after Direct Preference" in text
    assert blocks(text, "bash") == ["dpo-run data=hh 'run_dir=a b'\n"]
    assert yaml.safe_load(blocks(text, "yaml")[0]) == FACTS["config"]
    assert "arxiv.org/abs/2305.18290" in text


@pytest.mark.parametrize("chat", [False, True])
def test_the_usage_snippet_is_python(tmp_path, chat):
    (snippet,) = blocks(card(tmp_path, chat=chat), "python")
    ast.parse(snippet)
    assert ("apply_chat_template" in snippet) == chat


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_is_a_classifier(tmp_path, chat):
    text = card(tmp_path, stage="reward", chat=chat)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-classification"
    (snippet,) = blocks(text, "python")
    ast.parse(snippet)
    assert "AutoModelForSequenceClassification" in snippet
    assert "generate(" not in snippet
    assert f"add_special_tokens={not chat}" in snippet
    assert ("apply_chat_template" in snippet) == chat


def test_local_files_are_no_hub_ids(tmp_path):
    local = {"path": "/data/mine/train.jsonl", "hub_id": "Anthropic/hh-rlhf", "name": "jsonl"}
    text = card(tmp_path, data=local, model={"path": "/runs/sft-1/final"})
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data
    assert "final after Direct Preference Optimization on train.jsonl" in text


def test_a_card_of_little_leaves_out_what_it_does_not_know(tmp_path):
    write_model_card(tmp_path, {"stage": "sft"})
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"^#+ (.*)", text, flags=re.MULTILINE) == ["A model of dpo-run", "Usage"]
    assert "supervised fine-tuning" in text
    assert "Rafailov" not in text
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["sft", "dpo-run"]


def test_no_secrets_and_no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    text = card(
        tmp_path,
        command=["dpo-run", "x=correct-horse", "run_dir=/home/ada/runs/1", "y=/home/adam"],
        config={"cache_dir": "/home/ada", "list": ["/home/ada/x", "correct-horse"]},
        data={"path": "/home/ada/correct-horse.jsonl"},
    )
    assert "correct-horse" not in text
    assert not re.search(r"/home/ada\b", text)
    assert "run_dir=~/runs/1" in text
    assert "y=/home/adam" in text


def test_text_of_the_user_stays_text(tmp_path):
    evil = "evil | [x](y) `c`\n# head\n```\n<script>alert(1)</script>\n---\nlicense: mit"
    text = card(
        tmp_path,
        name=evil,
        results={evil: 1.0},
        config={"a": evil},
        command=[evil],
        data={"n": evil},
    )
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "# head" not in outside.splitlines()
    rows = [line for line in outside.splitlines() if line.startswith("| evil")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3  # still a row of two cells
    assert "license" not in ModelCard.load(tmp_path / "README.md").data.to_dict()
