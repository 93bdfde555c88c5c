"""What stages say of the kernel of the output layer, and what a cached reference knows of it."""

from types import SimpleNamespace

import torch

from dpo_cli.logprobs import fused_head
from dpo_cli.model.attention.interface import Placement
from dpo_cli.session.models import note_head
from dpo_cli.session.reference import reference_key
from small_models import build, examples


def on_cuda(notes=None):
    """What a stage is told of where it computes, for a session on a GPU that is not there."""
    device = torch.device("cuda", 0)
    return SimpleNamespace(
        placement=Placement(device, torch.bfloat16, notes.append if notes else print),
        runtime=SimpleNamespace(device=device, precision="bf16"),
    )  # fmt: skip


def test_a_refusal_is_told_when_the_model_is_loaded(monkeypatch):
    notes = [""]
    monkeypatch.setattr(fused_head, "refused", lambda shape: "no C compiler")
    note_head(build("gpt2"), on_cuda(notes).placement, "model.path")
    assert notes[1:] == [
        "model.path: log-probabilities use plain operations, which are slower (no C compiler)"
    ]
    monkeypatch.setattr(fused_head, "refused", lambda shape: None)
    note_head(build("gpt2"), on_cuda(notes).placement, "model.path")
    assert len(notes) == 2


def test_the_reference_key_tells_what_rounds_the_log_probabilities(monkeypatch):
    keys = set()
    reference = SimpleNamespace(model=build("gpt2").float(), digest="of its weights")
    for refusal in (None, "no C compiler"):
        for wide in (True, False):
            monkeypatch.setattr(fused_head, "refused", lambda shape, why=refusal: why)
            monkeypatch.setattr(fused_head, "unrounded", lambda device, dtype, yes=wide: yes)
            keys.add(reference_key(on_cuda(), reference, examples(2)))
    assert len(keys) == 4
