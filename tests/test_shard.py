"""A sharded model in one process: what is gathered for sampling, and what remains afterwards."""

import copy

import pytest
import torch
import torch.distributed as dist

from dpo_cli.distributed.fsdp import make_mesh, shard, unsharded
from dpo_cli.model.sampling import generate
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from test_generate import EOS, PAD, PROMPTS, build, quiet


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield make_mesh("cpu", 1, 1, "full")
    dist.destroy_process_group()


def hooks_of(model):
    return [list(table.values()) for part in model.modules()
            for table in (part._forward_pre_hooks, part._forward_hooks)]  # fmt: skip


def test_sampling_runs_no_hooks_of_fsdp_and_leaves_them(mesh, monkeypatch):
    monkeypatch.setitem(generate.STATIC, "cpu", True)
    options = SamplingOptions(2, max_new_tokens=6)
    drawn = lambda model: [  # noqa: E731
        c.ids.tolist() for row in sample(model, PROMPTS, options, EOS, PAD, note=quiet) for c in row
    ]
    model = build("llama")
    expected = drawn(copy.deepcopy(model))
    shard(model, mesh, torch.float32)
    before = hooks_of(model)
    assert any(before)
    with unsharded(model):
        assert not any(hooks_of(model))
        assert drawn(model) == expected
    assert hooks_of(model) == before
