"""Step 15: log-probabilities and gradients of the output layer, with and without the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from dpo_cli.logprobs import Head, fused_head, fused_loss, target_logprobs
from scripts.gpu_checks.facts import Fact, Setup
from scripts.measuring import best_seconds

CHECKED = 64  # rows compared with float64
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """trained: whether the weight is float32 and trained, or frozen in bf16 as under an adapter."""

    name: str
    tokens: int
    width: int
    vocab: int
    trained: bool


SHAPES = (
    Shape("gpt2-large", 8192, 1280, 50_257, True),
    Shape("7B", 4096, 4096, 32_000, False),
    Shape("8B of a large vocabulary", 4096, 4096, 128_256, False),
)
SMALL = (Shape("gpt2", 128, 32, 257, True), Shape("frozen", 128, 32, 256, False))


def check(setup: Setup) -> Iterator[Fact]:
    device = torch.device(setup.device, 0) if setup.device == "cuda" else torch.device("cpu")
    for shape in SMALL if setup.small else SHAPES:
        work = Work(shape, device)
        refused = work.head.refused(device, BF16)
        yield f"{shape.name}: kernel", "used" if refused is None else refused
        for name, fact, value in work.facts("plain operations"):
            yield f"{shape.name}: {name}, {fact}", value
        if refused is None:
            for name, fact, value in work.facts("kernel"):
                yield f"{shape.name}: {name}, {fact}", value
        elif not setup.small:
            raise AssertionError(f"the kernel cannot be used: {refused}")


class Work:
    """Random tensors of one shape, and the computations on them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.shape, self.device = shape, device
        self.hidden = torch.randn(shape.tokens, shape.width, generator=g, device=device)
        self.hidden.requires_grad_()
        weight = torch.randn(shape.vocab, shape.width, generator=g, device=device)
        weight *= 4.0 / shape.width**0.5
        self.weight = weight.requires_grad_() if shape.trained else weight.to(BF16)
        self.head = Head(self.weight)
        self.targets = torch.randint(shape.vocab, (shape.tokens,), generator=g, device=device)

    def facts(self, name: str) -> Iterator[tuple[str, str, float]]:
        """(name, unit, value) of the chunked head with plain operations or with the kernel."""
        with self._refusing(name == "plain operations"):
            logprobs, gradient = self.step()
            exact, exact_gradient = self._exactly()
            yield name, "log-probabilities, largest error", _largest(logprobs[:CHECKED] - exact)
            off = (gradient[:CHECKED] - exact_gradient).norm() / exact_gradient.norm()
            yield name, "gradients, relative error", float(off)
            yield (
                name,
                "scoring and training, largest difference",
                _largest(self.score() - logprobs),
            )
            del logprobs, gradient
            products = 3 if self.shape.trained else 2
            flop = 2.0 * self.shape.tokens * self.shape.width * self.shape.vocab
            before = self._memory(reset=True)
            seconds = best_seconds(self.device.type, self.step, times=2)
            yield name, "step, ms", 1e3 * seconds
            yield name, "step, TFLOP/s", products * flop / seconds / 1e12
            yield name, "step, peak GB", (self._memory() - before) / 1e9
            seconds = best_seconds(self.device.type, self.score, times=2)
            yield name, "scoring, ms", 1e3 * seconds
            yield name, "scoring, TFLOP/s", flop / seconds / 1e12

    def step(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and the gradient of their sum with respect to the hidden states."""
        counts = [CHECKED] * (self.shape.tokens // CHECKED)
        leaves = [self.hidden, self.weight] if self.shape.trained else [self.hidden]
        with torch.autocast(self.device.type, BF16):
            loss, logprobs = fused_loss(
                self.hidden, self.head, self.targets, counts, lambda values, _: values.sum()
            )
        return logprobs, torch.autograd.grad(loss, leaves)[0]

    def score(self) -> Tensor:
        with torch.autocast(self.device.type, BF16):
            return target_logprobs(self.hidden, self.head, self.targets)

    def _exactly(self) -> tuple[Tensor, Tensor]:
        """The same for the first rows in float64, from bf16 factors."""
        hidden = self.hidden[:CHECKED].detach().to(BF16).double().requires_grad_()
        weight = self.weight.detach().to(BF16).double()
        picked = self.targets[:CHECKED, None]
        values = (hidden @ weight.t()).log_softmax(1).gather(1, picked).squeeze(1)
        (gradient,) = torch.autograd.grad(values.sum(), hidden)
        return values.detach(), gradient

    def _memory(self, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def _refusing(self, plain: bool) -> AbstractContextManager[object]:
        return patch.object(fused_head, "refused", lambda _: "measured") if plain else nullcontext()


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
