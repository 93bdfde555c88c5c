"""A dry run of whatever the run itself could do: it counts models of every family."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import small_tokenizers
from dpo_cli.plan.dry_run import plan_tables
from dpo_cli.plan.memory.shape import shape_of
from families import TRAINED
from small_runs import configure

STAGES = {
    "sft": ["hardware.activation_checkpointing=1"], "dpo": [], "sample": [],
    "ppo-baseline": ["reward_fn=length", "stage.rollout_samples=8", "train.batch_size=4"],
    "evaluate": ["reward_fn=none"], "export": [], "inspect": [],
}  # fmt: skip
WITHOUT_HEADS = {  # as real configurations of these families are: no attention heads
    "mamba": {"vocab_size": 102, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "rwkv": {"vocab_size": 102, "hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", TRAINED)
def test_every_family_is_counted(family):
    config = AutoConfig.for_model(family, **TRAINED[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < shape.block.parameters <= shape.parameters


CASES = [*(("mamba", stage) for stage in STAGES), ("rwkv", "sft"), ("jamba", "dpo")]


@pytest.mark.parametrize(("family", "stage"), CASES)
def test_every_stage_has_a_plan(family, stage, tmp_path):
    options = WITHOUT_HEADS.get(family, {**TRAINED[family], "vocab_size": 102})
    AutoConfig.for_model(family, **options).save_pretrained(tmp_path / "model")
    small_tokenizers.words().save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"w{n} w1", "chosen": f" w{n + 2} w3", "rejected": " w4"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = configure(
        f"stage={stage}", "model=custom", f"model.path={tmp_path}/model", "data=jsonl",
        f"data.path={tmp_path}/pairs.jsonl", "hardware=cpu", "logger=none",
        f"run_dir={tmp_path}/run", "dry_run=true", *STAGES[stage],
    )  # fmt: skip
    rows, memory = plan_tables(config)
    assert ("writes", f"{tmp_path}/run") in rows
    assert bool(memory) == (stage not in ("export", "inspect"))
