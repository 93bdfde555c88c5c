"""Which attention kernel a loaded model can use for packed rows, found by probing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.device_memory import ran_out
from dpo_cli.errors import ConfigError, NonFiniteError, first_line
from dpo_cli.logprobs import logits_of
from dpo_cli.model import forward
from dpo_cli.model.adapters.quantize import dense_weights, dequantized
from dpo_cli.model.attention import interface, kernels
from dpo_cli.model.attention.interface import MAX_TOKENS, PACKED, Placement, Seen, short_windows
from dpo_cli.model.attention.kernel_check import HALF, kernel_mismatch, largest
from dpo_cli.model.rope import cuts_of, short_original_length
from dpo_cli.model.skeleton import PROBE_ERRORS, smallest_copy
from dpo_cli.model.stored import refuse_non_finite
from dpo_cli.model.vetting import one_line
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample

VALUE_TOLERANCE = 2e-3  # nats, on random tokens in float32
GRADIENT_TOLERANCE = 1e-2  # relative, of any vector of weights

# (model, prompt ids, response ids) -> values by the model's own forward, one sequence
Plain = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
# (model, examples) -> the same values of all their responses, from one packed row
Packed = Callable[[PreTrainedModel, Sequence[EncodedExample]], Tensor]


def _packed_logprobs(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> Tensor:
    row = pack(examples, range(len(examples)), cuts=cuts_of(model.config)).to(model.device)
    logits = logits_of(forward.target_states(model, row), forward.head_of(model))
    return logits.log_softmax(-1).gather(1, row.targets[:, None]).squeeze(1)


def refuse_unavailable(choice: str, on: Placement | None) -> None:
    """ConfigError for a kernel that this machine or precision cannot run; before weights load."""
    on = on or Placement()
    reason = kernels.lacking(choice, on.device, on.dtype)
    if reason is not None:
        raise ConfigError(f"model.attention={choice}: {reason}; or use model.attention=auto")


def choose_attention(
    model: PreTrainedModel,
    choice: str,
    plain_values: Plain = forward.padded_token_logprobs,
    packed_values: Packed = _packed_logprobs,
    on: Placement | None = None,
    key: str = "model.path",
) -> None:
    """Use the fastest kernel that reproduces the model's own forward and gradients.

    Some families ignore a registered attention, so each kernel is probed on a few of the loaded
    layers in float32 (`skeleton`), on the model's device; kernels for CUDA in half precision are
    probed on tensors of the layers' shapes. Falls back to the dense mask, then to plain padded
    rows, with a note. Compared are token log-probabilities, unless other functions are given.

    choice: `auto` or a kernel. on: where the model will compute. Raises ConfigError if the choice
    (with auto, every kernel) fails, and NonFiniteError for non-finite weights.
    """
    on = on or Placement()
    refuse_unavailable(choice, on)
    if on.device.type == "cuda":  # cuDNN's SDPA has given NaN on PyTorch 2.13
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not on.sharded:  # sharded weights are checked as they are moved to the device
        refuse_non_finite(type(model).__name__, dense_weights(model))
    reasons: dict[str, str] = {}
    copied = smallest_copy(model.eval(), on.device, plain_values)
    with dequantized(copied), _Trial(copied, plain_values, packed_values).begin() as trial:
        for kernel in _order(choice, on):
            reason = trial.mismatch(kernel, on)
            if reason is None:
                break
            reasons[kernel] = reason
    details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    family = type(model).__name__
    if len(reasons) == len(_order(choice, on)):
        raise ConfigError(f"model.attention={choice}: {family} cannot be used ({details})")
    interface.use_kernel(model, kernel)
    if reasons:
        on.note(f"{key}: {family} runs with attention={kernel}{_cost(kernel)} ({details})")


def _order(choice: str, on: Placement) -> tuple[str, ...]:
    """Kernels to try, fastest first."""
    if choice != "auto":
        return (choice,)
    if on.device.type == "cpu":
        return ("grouped", "dense", "plain")
    fast = ("varlen", "flex") if on.device.type == "cuda" and on.dtype in HALF else ()
    return (*fast, "sdpa", "dense", "plain")


def _cost(kernel: str) -> str:
    if kernel not in MAX_TOKENS:
        return ""
    return f", slower than packed, at most {MAX_TOKENS[kernel]:,} tokens per micro-batch"


@dataclass(frozen=True)
class _Figures:
    """values: (n,); gradients: of a weighted sum of the values, for each weight vector."""

    values: Tensor
    gradients: list[Tensor]


class _Trial:
    """A model's own forward on a few random tokens, with which kernels are compared."""

    def __init__(self, model: PreTrainedModel, plain: Plain, packed: Packed) -> None:
        self.model, self.plain, self.packed = model, plain, packed
        self.seen: list[Seen] = []
        # Shows whether the family can be packed at all, on the device of its weights.
        self.exact = "grouped" if model.device.type == "cpu" else "sdpa"
        self.interface: str | None = None  # why no packed kernel can be used

    @contextmanager
    def begin(self) -> Iterator[_Trial]:
        with short_windows(self.model), short_original_length(self.model), torch.enable_grad():
            self.model.set_attn_implementation("eager")
            self.truth = self._plain_figures()
            _refuse_overflow(self.model, self.truth.values)
            self._refuse_non_causal()
            self.interface = self._packed(self.exact)
            yield self

    def _plain_figures(self) -> _Figures:
        try:
            return self._figures(self._plain_values())
        except (*PROBE_ERRORS, ArithmeticError) as error:  # ArithmeticError: division by size 0
            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            raise ConfigError(
                f"{type(self.model).__name__}: its own forward fails ({one_line(error)}): check "
                "its config.json, or use another model.path"
            ) from error

    def mismatch(self, kernel: str, on: Placement) -> str | None:
        """Why a kernel cannot be used, or None."""
        cuda = on.device.type == "cuda"
        if kernel in PACKED and (self.interface is not None or (kernel == self.exact and not cuda)):
            return self.interface
        if kernel in PACKED and cuda:
            return kernel_mismatch(kernel, self.seen, on, attention_dropout(self.model))
        return self._packed(kernel)

    def _plain_values(self) -> Tensor:
        device = self.model.device
        return torch.cat([
            self.plain(self.model, *(torch.tensor(x, device=device).long() for x in (p, r)))
            for e in self._examples() for p, r in ((e.prompt_ids, r) for r in e.response_ids)
        ])  # fmt: skip

    @torch.no_grad()
    def _refuse_non_causal(self) -> None:
        """ConfigError if later tokens change the values of earlier ones, as in an encoder."""
        if cuts_of(self.model.config):  # a longer text has other rotary factors from its start
            return
        example, device = self._examples()[0], self.model.device
        prompt, response = (
            torch.tensor(x).long().to(device) for x in (example.prompt_ids, example.response_ids[0])
        )
        full, start = (self.plain(self.model, prompt, r) for r in (response, response[:2]))
        if len(full) == len(response) and not (full[:2] - start).abs().max() < VALUE_TOLERANCE:
            raise ConfigError(
                f"{type(self.model).__name__} is not a causal language model as configured: later "
                "tokens change the log-probabilities of earlier ones; use another model.path"
            )

    def _packed(self, kernel: str) -> str | None:
        if kernel == "dense" and getattr(self.model.config.get_text_config(), "window_size", None):
            return "its windows count rows"  # GPT-Neo's windows are buffers of fixed size
        try:
            interface.use_kernel(self.model, kernel)
            with interface.recording_calls() as seen:
                figures = self._figures(self.packed(self.model, self._examples()))
        except PROBE_ERRORS as error:
            return first_line(error)
        if kernel in PACKED and not seen:
            return "it ignores the registered attention"
        self.seen = self.seen or list(dict.fromkeys(seen))
        return _difference(figures, self.truth)

    def _figures(self, values: Tensor) -> _Figures:
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if not weights:
            return _Figures(values.detach(), [])
        # Norms and biases lie in every layer and cost no memory.
        vectors = [p for p in weights if p.ndim == 1] or [min(weights, key=torch.numel)]
        weighted = values * torch.linspace(1.0, 2.0, len(values)).to(values)
        gradients = torch.autograd.grad(weighted.sum(), vectors, allow_unused=True)
        pairs = zip(gradients, vectors, strict=True)
        return _Figures(
            values.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]
        )

    def _examples(self) -> list[EncodedExample]:
        vocab = self.model.config.get_text_config().vocab_size
        ids = np.random.default_rng(0).integers(0, vocab, 17).astype(np.int32)
        return [  # of 7, 6, 2 and 6 tokens, so that PlainLayout also pads
            EncodedExample(ids[:3], (ids[3:7], ids[7:10]), 0),
            EncodedExample(ids[10:11], (ids[11:12], ids[12:17]), 1),
        ]


def _refuse_overflow(model: PreTrainedModel, values: Tensor) -> None:
    """Raise NonFiniteError if the plain forward is not finite, whatever the kernel."""
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            f"{type(model).__name__}: its own forward is not finite, as it overflows in this "
            "precision; use other weights (model.path)"
        )


def _difference(packed: _Figures, plain: _Figures) -> str | None:
    """How a packed row differs from the plain forward beyond rounding, or None."""
    error = float((packed.values - plain.values).abs().max())  # NaN if any is
    if not error < VALUE_TOLERANCE:
        return f"its values differ from the plain forward's by {error:.2g}"
    pairs = list(zip(packed.gradients, plain.gradients, strict=True))
    # Some gradients, such as a key bias's, are zero up to rounding.
    floor = 1e-3 * largest(g.norm() for g in plain.gradients)
    worst = largest((a - b).norm() / (b.norm() + floor) for a, b in pairs)
    if not worst < GRADIENT_TOLERANCE:
        return f"its gradients differ from the plain forward's by {worst:.1%}"
    return None


def attention_dropout(model: PreTrainedModel) -> float:
    """The highest attention dropout in the configuration: `attn_pdrop`, `attention_dropout`, ..."""
    config: dict[str, Any] = vars(model.config.get_text_config())
    rates = [v for k, v in config.items() if "att" in k and "drop" in k and isinstance(v, float)]
    return max(rates, default=0.0)
