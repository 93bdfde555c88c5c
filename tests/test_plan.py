"""What a dry run and the first lines of training tell: devices, trained weights, what is absent."""

import json
import shutil

import pytest
import torch

from dpo_cli import cli
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.errors import ConfigError
from dpo_cli.model.source import model_folder
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.session.preview import device_line
from dpo_cli.session.rows import begin_training
from dpo_cli.train.runtime import Runtime
from small_adapters import write_base
from small_runs import TINY, configure, train

# Of the base: 2 layers x (q, o 32 x 32; k, v 32 x 16; gate, up, down 32 x 48; 2 norms of 32),
# embedding and output layer 1024 x 32 each, the last norm.
PARAMETERS = 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 2 * 32768 + 32
ADAPTER = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)  # at rank 4, of the same matrices


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "cuda, bf16"),
        ("hardware.devices=8", "8 devices, sharded; cuda, bf16"),
        ("hardware.devices=8 hardware.nodes=2", "16 devices on 2 nodes, sharded; cuda, bf16"),
        (
            "hardware.devices=8 hardware.nodes=2 hardware.sharding=hybrid",
            "16 devices on 2 nodes, sharded within a node, replicated across nodes; cuda, bf16",
        ),
        ("stage=inspect hardware.devices=8", "cuda, bf16"),
    ],
)
def test_devices(words, line):
    config = configure("model=gpt2", *words.split())
    assert device_line(config, Runtime(torch.device("cuda"), "bf16")) == line


def test_a_folder_without_weights_is_planned_but_not_loaded(base, tmp_path, monkeypatch):
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    words = ("stage=dpo", "lora=qlora", "lora.r=4", f"model.path={bare}", f"cache_dir={tmp_path}/c")
    told = dict(plan_rows(configure(*TINY, *words, "run_dir=x")))
    assert told["policy"] == f"{bare}, 0.1M weights"
    assert told["trained"] == f"{ADAPTER:,} weights (LoRA r 4), 0.1M frozen in nf4"
    with pytest.raises(ConfigError, match=r"bare: has a config.json but no .safetensors") as found:
        train(tmp_path / "x", *words)
    assert "pickled" not in str(found.value)


def test_what_does_not_fit_is_told_and_no_error(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = (*TINY[4:7], f"model.path={base}", f"cache_dir={tmp_path}/c", "hardware=cpu")
    cli.main(["stage=sft", *words, "dry_run=true", "hardware.memory_gb=0.001"])
    assert "no, a process has 1 MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("lora=lora lora.r=4", f"trained: {ADAPTER:,} weights (LoRA r 4), 0.1M frozen"),
        ("lora=qlora lora.r=4", f"trained: {ADAPTER:,} weights (LoRA r 4), 0.1M frozen in nf4"),
        ("", f"trained: {PARAMETERS:,} weights"),
    ],
)
def test_training_says_what_is_trained(base, tmp_path, capsys, words, line):
    few = ("train.max_steps=1", "train.sample_prompts=0", "logger.progress=plain")
    train(tmp_path / "r", "stage=sft", f"model.path={base}", *few, *words.split())
    assert line in capsys.readouterr().err.splitlines()


class Told:
    """As much of a session as the line needs."""

    def __init__(self, config, size):
        self.config, self.ranks, self.lines, self.steps = config, Ranks(0, size), [], None

    def note(self, line):
        self.lines.append(line)

    def begin(self, steps):
        self.steps = steps


def test_the_line_counts_devices_and_what_four_bits_stand_for():
    model = torch.nn.Linear(4, 6, bias=False).requires_grad_(False)
    packed = torch.nn.Parameter(torch.zeros(10**6, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = type("State", (), {"shape": (1000, 2000)})
    model.packed, model.own = packed, torch.nn.Parameter(torch.zeros(3, 5))
    told = Told(configure("model=gpt2", "lora=qlora"), 2)
    begin_training(told, model, 7)
    assert told.lines == ["trained: 15 weights (LoRA r 16), 2.0M frozen in nf4; 2 devices"]
    assert told.steps == 7


def test_a_checkpoint_of_several_devices_is_no_model_folder(tmp_path):
    (tmp_path / "step-2" / "shards").mkdir(parents=True)
    (tmp_path / "step-2" / "state.json").write_text(json.dumps({"step": 2}))
    with pytest.raises(
        ConfigError, match=r"sharded checkpoint, which only resume=.*use the run's f"
    ):
        model_folder(str(tmp_path / "step-2"))
