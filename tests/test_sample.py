"""stage=sample: a row a prompt and temperature, greedy once."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.session.sampling import completion_text, text_of
from small_runs import train
from small_tokenizers import byte_level, llama, words


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "sft"
    train(folder, "stage=sft", "train.max_steps=4", "optim.lr=3e-3")
    return folder


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_each_prompt_at_each_temperature(sft, tmp_path):
    found = train(tmp_path / "s", "stage=sample", f"model.path={sft}", "stage.prompts=3",
                  "stage.eval_prompts=2", "stage.completions=4", "stage.max_new_tokens=6",
                  "stage.temperatures=[0,1,1,0.5]")  # fmt: skip
    rows = rows_of(tmp_path / "s", "train")
    assert [row["temperature"] for row in rows] == [0.0, 1.0, 1.0, 0.5] * 3
    assert [len(row["completions"]) for row in rows] == [1, 4, 4, 4] * 3
    assert len({row["prompt"] for row in rows}) == 3
    assert rows[0]["prompt"] == rows[3]["prompt"]
    for row in rows:
        assert len(row["finished"]) == len(row["completions"])
        assert all(isinstance(flag, bool) for flag in row["finished"])
    assert rows[1]["completions"] != rows[2]["completions"]  # drawn anew
    assert found["train_prompts"] == 3
    assert found["train_completions"] == 39
    flags = [flag for row in rows for flag in row["finished"]]
    assert found["train_finished"] == pytest.approx(sum(flags) / len(flags))
    assert 0 <= found["train_finished_low"] <= found["train_finished"]
    assert found["train_finished"] <= found["train_finished_high"] <= 1
    assert len(rows_of(tmp_path / "s", "eval")) == 8


@pytest.mark.parametrize("metaspace", [True, False])
def test_a_completions_first_space_survives_sentencepiece(metaspace):
    """Its decoders take the space off the beginning of a text, which no completion is."""
    tokenizer = llama(metaspace=metaspace)
    ids = np.array(tokenizer("the cat sat on the mat", add_special_tokens=False).input_ids)
    whole = text_of(tokenizer, ids)
    texts = [whole.removeprefix(text_of(tokenizer, ids[:n])) for n in range(1, len(ids))]
    assert [t for t in texts if t.startswith(" ")]
    assert [completion_text(tokenizer, ids[n:]) for n in range(1, len(ids))] == texts
    assert completion_text(tokenizer, np.array([tokenizer.eos_token_id])) == ""


def test_other_completions_are_what_the_tokenizer_decodes():
    for tokenizer, text in ((byte_level(), " the cat sat: äß文"), (words(), "w3 w5 w7")):
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
        for n in range(len(ids)):  # also from within a character of several bytes
            assert completion_text(tokenizer, ids[n:]) == tokenizer.decode(ids[n:])


def test_temperature_zero_is_the_likeliest_token(sft, tmp_path):
    train(tmp_path / "s", "stage=sample", f"model.path={sft}", "stage.prompts=2",
          "stage.eval_prompts=0", "stage.max_new_tokens=5", "stage.temperatures=[0]")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(sft / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(sft / "final")
    for row in rows_of(tmp_path / "s", "train"):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        ended = ids[-1] == tokenizer.eos_token_id
        assert row["completions"] == [
            tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        ]
        assert row["finished"] == [ended]
    assert not (tmp_path / "s" / "eval.jsonl").exists()
