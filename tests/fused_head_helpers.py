"""Where the tests of the output layer's kernel compute, and what it is to find."""

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
# For tests that run in the interpreter as well, which the mark itself would skip.
also_cuda = pytest.mark.cuda if CUDA else lambda test: test


def exactly(logits, targets, bias, scale, softcap):
    raw = logits.double() if bias is None else logits.double() + bias.double()
    raw = (raw * scale).requires_grad_()
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    values = capped.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (slopes,) = torch.autograd.grad(values.sum(), raw)
    return values.detach(), slopes
