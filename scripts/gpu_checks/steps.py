"""The steps in the order in which they run: those cut off at the end matter least.

Estimates were made before any run on a GPU, for one H100 of 80 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.gpu_checks.facts import Expect


@dataclass(frozen=True)
class Step:
    """run: `module:function`. seconds: expected duration on one H100; limit: seconds after which it
    is killed. alone: it measures time, so it runs alone; the others run side by side. gib: memory
    that the device must have."""

    number: int
    name: str
    run: str
    seconds: int
    limit: int
    checks: str
    expected: Sequence[Expect] = ()
    alone: bool = True
    gib: float = 0.0


EXIT = Expect("*: exit code", 0, 0)
LN2 = 0.693147
SAME_LOSSES = Expect("losses, largest difference from ours", high=0.03, optional=True)

STEPS = (
    Step(
        0, "machine", "scripts.gpu_checks.ceilings:check", 15, 60,
        "versions; speed of copies on the device, of bf16 products, of the disk",
        [Expect("copy, TB/s", low=0.001, about=(2.4, 3.3)),
         Expect("bf16 matmul, TFLOP/s", low=0.001, about=(600, 900)),
         Expect("disk write, GB/s", low=0.001)],
    ),
    Step(
        1, "CUDA tests", "scripts.gpu_checks.suite:check", 120, 160,
        "the tests that need a GPU, without FlexAttention's slow compilations",
        [Expect("failed", 0, 0), Expect("exit code", 0, 0), Expect("passed", low=1, cuda=True),
         Expect("seen to fail: *", 0, 0, optional=True)], alone=False,
    ),
    Step(
        2, "attention kernels", "scripts.gpu_checks.attention:check", 25, 90,
        "result and gradients of each kernel against float64 softmax, one sequence at a time",
        [Expect("difference, *", high=0.02, about=(0.001, 0.007))], alone=False,
    ),
    Step(
        3, "gpt2-large against a CPU", "scripts.gpu_checks.exactness:check", 55, 170,
        "random weights, 8 pairs: bf16 packed rows against transformers' own forward in float32",
        [Expect("log-probability, largest difference of a token", high=0.05),
         Expect("gradients, relative difference", high=0.05, about=(0.0, 0.03)),
         Expect("first DPO loss", LN2 - 2e-3, LN2 + 2e-3)], alone=False,
    ),
    Step(
        4, "the command", "scripts.gpu_checks.commands:check", 65, 200,
        "dpo-run with small models: every stage that trains, resume, adapters, hardware choices",
        [EXIT, Expect("*: losses, largest difference", high=5e-3, cuda=True),
         Expect("*: first loss", LN2 - 2e-3, LN2 + 2e-3)], alone=False,
    ),
    Step(
        5, "out of memory", "scripts.gpu_checks.shortage:check", 35, 120,
        "a run with limited memory halves its micro-batches and computes the same",
        [Expect("times halved", low=1), Expect("losses, largest difference", high=1e-3)],
        alone=False,
    ),
    Step(
        6, "sharded", "scripts.gpu_checks.sharding:check", 30, 90,
        "FSDP2 in one process (NCCL on a GPU): losses, gradient norms, a checkpoint, samples",
        [Expect("losses, largest difference", high=1e-3),
         Expect("gradient norms, relative difference", high=0.02),
         Expect("after a checkpoint, largest difference of weights", 0, 0),
         Expect("sampled tokens that are equal", low=0.5)], alone=False,
    ),
    Step(
        16, "weights to measure with", "scripts.gpu_checks.speed:weights", 60, 150,
        "the random weights and rows of steps 7 to 11, created in the background",
        [Expect("gpt2-large, s", low=0.0), Expect("7B, s", low=0.0)], alone=False, gib=22,
    ),
    Step(
        7, "gpt2-large", "scripts.gpu_checks.speed:ours", 35, 110,
        "full fine-tuning with DPO, HH pairs, 64 per step",
        [Expect("ours, pairs/s", low=0.001, about=(230, 390)),
         Expect("ours, MFU", low=0.0, about=(0.28, 0.36), optional=True),
         Expect("first loss", LN2 - 2e-3, LN2 + 2e-3)], gib=22,
    ),
    Step(
        8, "gpt2-large, TRL", "scripts.gpu_checks.speed:trl", 65, 130,
        "the same in TRL with its reference cached, 4 micro-batches of 16",
        [SAME_LOSSES, Expect("TRL, pairs/s", low=0.001, about=(64, 108)),
         Expect("pairs/s, ours / TRL", about=(2.6, 3.8), optional=True),
         Expect("first loss", LN2 - 2e-2, LN2 + 2e-2)], gib=38,
    ),
    Step(
        9, "gpt2-large, compiled", "scripts.gpu_checks.speed:compiled", 45, 130,
        "as ours, with hardware.compile=blocks",
        [SAME_LOSSES, Expect("compiled, pairs/s", low=0.001, about=(340, 475)),
         Expect("first loss", LN2 - 2e-3, LN2 + 2e-3)], gib=22,
    ),
    Step(
        10, "7B, LoRA", "scripts.gpu_checks.speed:lora", 55, 150,
        "Mistral 7B's shape with random weights, LoRA of rank 16, 16 pairs per step",
        [Expect("ours, pairs/s", low=0.001, about=(34, 56)),
         Expect("first loss", LN2 - 2e-3, LN2 + 2e-3)], gib=38,
    ),
    Step(
        11, "7B, QLoRA", "scripts.gpu_checks.speed:qlora", 55, 150,
        "the same over 4-bit weights",
        [Expect("QLoRA, pairs/s", low=0.001),
         Expect("pairs/s, QLoRA / ours", about=(0.85, 0.95), optional=True),
         Expect("first loss", LN2 - 2e-3, LN2 + 2e-3)], gib=22,
    ),
    Step(
        12, "decoding", "scripts.gpu_checks.sampling:check", 40, 100,
        "gpt2-large in bf16: 128 and 512 rows, prompts shared and not, compared with generate",
        [Expect("ours, *, ms per token", low=0.001, about=(1.5, 15)),
         Expect("greedy log-probabilities, relative difference", high=3e-3)],
    ),
    Step(
        13, "saving and loading", "scripts.gpu_checks.saving:check", 60, 150,
        "gpt2-large: seconds that a checkpoint blocks training, seconds to load",
        [Expect("load, s", low=0.0), Expect("checkpoint, s of the loop", low=0.0)], gib=22,
    ),
    Step(
        14, "7B, TRL", "scripts.gpu_checks.speed:lora_trl", 60, 150,
        "TRL's side of step 10",
        [SAME_LOSSES, Expect("TRL, pairs/s", low=0.001)], gib=60,
    ),
    Step(
        15, "output layer", "scripts.gpu_checks.output_layer:check", 20, 60,
        "log-probabilities and gradients against float64, with the kernel and without",
        [Expect("*kernel, log-probabilities, largest error", high=1e-4, cuda=True),
         Expect("*gradients, relative error", high=0.02),
         Expect("*scoring and training, largest difference", high=1e-4),
         Expect("*step, ms", low=0.0)],
    ),
    Step(
        17, "7B, loading", "scripts.gpu_checks.saving:seven", 30, 100,
        "seconds, and memory of the host, until a 7B policy is on its device",
        [Expect("load, s", low=0.0)], gib=38,
    ),
)  # fmt: skip
