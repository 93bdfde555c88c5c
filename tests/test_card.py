"""The model card: valid metadata, true facts, nothing private, nothing executable."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from dpo_cli.report.card import write_model_card
from dpo_cli.report.files import without_paths
from page_runs import dpo_run

NO_BREAK = "\N{NO-BREAK SPACE}"

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
    assert "| Metric | Value |\n|---|---:|\n| Held-out loss | 0.612 |\n" in text
    assert "accuracy" not in text  # unknown
    assert "| fingerprint | 00ff |" in text
    assert "openai-community/gpt2 (revision 607a30d) after Direct Preference" in text
    assert blocks(text, "bash") == ["dpo-run data=hh 'run_dir=a b'\n"]
    assert yaml.safe_load(blocks(text, "yaml")[0]) == FACTS["config"]
    assert "arxiv.org/abs/2305.18290" in text


def test_results_with_an_interval_come_first_and_are_few(tmp_path):
    name = "eval/rewards/accuracies"
    results = {
        "eval/loss": 0.61234, "first/eval/loss": 0.69315, name: 0.6, f"{name}_low": 0.52,
        f"{name}_high": 0.675, f"first/{name}": 0.5, "loss": 0.5, "lr": 1e-6,
        **{f"rewards/{n}": 1.0 for n in range(30)},
    }  # fmt: skip
    text = card(tmp_path, results=results)
    table = text.partition("## Results\n\n")[2].partition("\n\n")[0]
    assert table.replace(NO_BREAK, " ").splitlines() == [
        "| Metric | Value | 95% interval | Before |",
        "|---|---:|---:|---:|",
        "| Held-out preference accuracy | 60.0% | 52.0% to 67.5% | 50.0% |",
        "| Held-out loss | 0.612 |  | 0.693 |",
    ]
    assert text.index("## Results") < text.index("## Usage")


def test_curves_and_samples_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    run = dpo_run(tmp_path / "run", samples=[
        {"step": step, "prompt": "Say /etc ```", "completion": f"correct-horse {step}"}
        for step in (0, 10, 20)
    ])  # fmt: skip
    (tmp_path / "final").mkdir()
    write_model_card(tmp_path / "final", FACTS, run)
    text = (tmp_path / "final" / "README.md").read_text()
    (picture,) = re.findall(r"!\[.*\d.*\]\((.*)\)", text)
    png = (tmp_path / "final" / picture).read_bytes()
    assert png == (run / "plots" / "overview.png").read_bytes()
    samples = text.partition("## Samples")[2].partition("## Data")[0]
    assert re.findall(r"^.*(?=:$)", samples, re.MULTILINE) == [
        "Prompt", "Before training: step 0", "After: step 20",
    ]  # fmt: skip
    assert "````text\nSay /etc ```\n````" in samples
    assert "\n[redacted] 20\n" in samples


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run_dir=/home/ada/my runs/1", "run_dir=1"),
        ("++model.path=runs/sft/final", "++model.path=sft"),
        ("stage.policies=[/h/a/final,../b]", "stage.policies=[a,b]"),
        ("/h/a/checkpoints/step-8", "a/checkpoints/step-8"),
        ("model.hub_id=openai-community/gpt2", "model.hub_id=openai-community/gpt2"),
        ("https://x.org/a/b and/or /etc/passwd.", "https://x.org/a/b and/or passwd."),
        ({"path": "runs/sft"}, {"path": "sft"}),
        ([1, None, "a / b"], [1, None, "a / b"]),
    ],
)
def test_local_paths_are_reduced_to_their_last_part(text, shown):
    assert without_paths(text) == shown


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
    assert "sft-1 after Direct Preference Optimization on train.jsonl" in text


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
    assert not re.search(r"/home|\bada\b", text)
    assert "run_dir=1 y=adam" in text


def test_text_of_the_user_stays_text(tmp_path):
    evil = "evil | [x](y) `c`\n# head\n```\n<script>alert(1)</script>\n---\nlicense: mit"
    text = card(
        tmp_path,
        name=evil,
        config={"a": evil},
        command=[evil],
        data={evil: evil},
    )
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "# head" not in outside.splitlines()
    rows = [line for line in outside.splitlines() if line.startswith("| evil")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3  # still a row of two cells
    assert "license" not in ModelCard.load(tmp_path / "README.md").data.to_dict()
