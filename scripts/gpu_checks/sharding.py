"""Step 6: FSDP2 in one process, with a world of one rank, compared with the unsharded model."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_cli.config import DpoConfig, OptimConfig
from dpo_cli.distributed import sharded_checkpoint
from dpo_cli.distributed.fsdp import full_tensor, make_mesh, reshard, shard, unsharded
from dpo_cli.model.attention.interface import kernel_of, prepare_layout, use_kernel
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from dpo_cli.stages.dpo import dpo_loss
from dpo_cli.train.optim import build_optimizer, take_step
from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import random_examples, sampled

SHAPE = {
    "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 500,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
STEPS, RATE = 4, 1e-3
PROMPTS = 8


def check(setup: Setup) -> Iterator[Fact]:
    cuda = setup.device == "cuda"
    join("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield "backend", dist.get_backend()
        kernel = "varlen" if cuda else "grouped"
        rows = random_examples([(9, 5, 7)] * PROMPTS, SHAPE["vocab_size"])
        model = build(kernel).to(setup.device)
        expected = train(model, rows, setup.device)[0]
        tokens = greedy(model, rows, setup.device)
        model = build(kernel)
        shard(model, make_mesh(setup.device, 1, 1, "full"), torch.bfloat16)
        figures, optimizer = train(model, rows, setup.device)
        pairs = list(zip(figures, expected, strict=True))
        yield "losses", " ".join(f"{loss:.4f}" for loss, _ in figures)
        yield "losses, largest difference", max(abs(a[0] - b[0]) for a, b in pairs)
        yield "gradient norms, relative difference", max(abs(a[1] / b[1] - 1) for a, b in pairs)
        yield "after a checkpoint, largest difference of weights", restored(setup, model, optimizer)
        with unsharded(model):
            again = greedy(model, rows, setup.device)
        yield "sampled tokens that are equal", float(np.mean(np.array(again) == np.array(tokens)))
    finally:
        dist.destroy_process_group()


def join(backend: str) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1",
                      LOCAL_RANK="0")  # fmt: skip
    dist.init_process_group(backend)


def build(kernel: str) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    use_kernel(model.train(), kernel)
    return model


def train(model: Any, rows: list[EncodedExample], device: str) -> tuple[list[Any], Any]:
    """(mean loss, gradient norm) of each step, and the optimizer."""
    optimizer, figures = build_optimizer(model, OptimConfig(lr=RATE), RATE), []
    for _ in range(STEPS):
        batch = prepare_layout(pack(rows, range(len(rows))), kernel_of(model)).to(device)
        reference = torch.zeros(len(rows), 2, device=device)
        with torch.autocast(device, torch.bfloat16):
            out = dpo_loss(model, batch, lambda _: reference, DpoConfig())  # noqa: B023
        out.loss_sum.backward()
        norm = take_step(model, optimizer, float(len(rows)), 1.0, RATE)
        figures.append((out.loss_sum.item() / len(rows), float(norm)))
    return figures, optimizer


def greedy(model: Any, rows: list[EncodedExample], device: str) -> list[list[int]]:
    with torch.autocast(device, torch.bfloat16):
        completions = sampled(model, [row.prompt_ids for row in rows], 1, 4, temperature=0.0)
    return [completion.ids.tolist() for completion in completions]


def restored(setup: Setup, model: Any, optimizer: Any) -> float:
    """Write a checkpoint, overwrite the weights, read it back."""
    reshard(model)
    before = {n: full_tensor(p.detach()).clone() for n, p in model.named_parameters()}
    folder = setup.folder("sharded")
    sharded_checkpoint.write(folder, model, optimizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    sharded_checkpoint.read(folder, model, optimizer)
    after = {n: full_tensor(p.detach()) for n, p in model.named_parameters()}
    return max(float((after[n] - before[n]).abs().max()) for n in before)
