"""Step 3: packed rows in bf16 on the device compared with a plain forward in float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_cli.config import DpoConfig
from dpo_cli.model import forward
from dpo_cli.model.attention.interface import Placement, kernel_of, prepare_layout
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from dpo_cli.stages.dpo import dpo_loss
from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import random_examples

BETA = 0.1
# (prompt, chosen, rejected) tokens, as in HH
LENGTHS = ((96, 40, 52), (124, 61, 33), (60, 12, 90), (181, 25, 47),
           (33, 77, 20), (210, 45, 66), (75, 9, 14), (142, 31, 58))  # fmt: skip
SHORT = ((9, 4, 6), (5, 7, 1))
LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024}
SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 500,
         "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def check(setup: Setup) -> Iterator[Fact]:
    device = torch.device(setup.device)
    torch.set_num_threads(setup.threads)
    model = random_gpt2(SMALL if setup.small else LARGE, device)
    rows = random_examples(SHORT if setup.small else LENGTHS, model.config.vocab_size)
    exact = copy.deepcopy(model).cpu()
    fuse_gelu(model)
    choose_attention(model, "auto", on=Placement(device, torch.bfloat16, print))
    yield "attention", kernel_of(model)
    values = packed(model, rows, device)
    yield "first DPO loss", values["loss"]
    yield "peak memory, GiB", peak(device)
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    del model
    expected = plain_logprobs(exact, rows)
    pairs = list(zip(values["logprobs"], expected, strict=True))
    away = torch.cat([(a - b).abs() for a, b in pairs])
    yield "log-probability, largest difference of a token", float(away.max())
    yield "log-probability, mean difference of a token", float(away.mean())
    yield from gradient_facts(grads, {n: p.grad for n, p in exact.named_parameters()})


def random_gpt2(shape: dict[str, int], device: torch.device) -> Any:
    """Without dropout; drawn on the device, where it is fast."""
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with device:
        return GPT2LMHeadModel(GPT2Config(**shape, **rates)).eval()


def packed(model: Any, rows: Sequence[EncodedExample], device: torch.device) -> dict[str, Any]:
    """One step as in stage=dpo, with gradients: its mean loss, and the log-probabilities of each
    response's tokens."""
    batch = prepare_layout(pack(rows, range(len(rows))), kernel_of(model)).to(device)
    stage = DpoConfig(beta=BETA)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            tokens = forward.token_logprobs(model, batch)
        reference = forward.sequence_logprobs(model, batch).view(-1, 2)
        out = dpo_loss(model, batch, lambda _: reference, stage)
    (out.loss_sum / len(rows)).backward()
    parts = tokens.float().cpu().split(batch.sequence_lengths.tolist())
    return {"loss": out.loss_sum.item() / len(rows), "logprobs": parts}


def plain_logprobs(model: Any, rows: Sequence[EncodedExample]) -> list[Tensor]:
    """The same by the model's own forward, one response at a time, with the gradient of the same
    loss in closed form: policy = reference, so d loss / d log p is -beta/2 for the chosen response,
    +beta/2 for the other."""
    values = []
    for example in rows:
        for ids, sign in zip(example.response_ids, (-1.0, 1.0), strict=True):
            prompt = len(example.prompt_ids)
            row = torch.tensor([*example.prompt_ids, *ids]).long()[None]
            logits = model(input_ids=row, use_cache=False).logits[0, prompt - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, row[0, prompt:, None]).squeeze(1)
            (sign * BETA / 2 / len(rows) * logprobs.sum()).backward()
            values.append(logprobs.detach())
    return values


def gradient_facts(values: dict[str, Tensor], exact: dict[str, Tensor]) -> Iterator[Fact]:
    """Difference over all weights, and of the matrix with the largest one."""
    assert values.keys() == exact.keys()
    away = {n: (float((values[n] - exact[n]).norm()), float(exact[n].norm())) for n in exact}
    total = [sum(x * x for x in norms) for norms in zip(*away.values(), strict=True)]
    yield "gradients, relative difference", (total[0] / total[1]) ** 0.5
    relative = {n: away[n][0] / away[n][1] for n in exact if exact[n].ndim > 1}
    worst = max(relative, key=relative.__getitem__)
    yield f"gradients, of {worst}", relative[worst]


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
