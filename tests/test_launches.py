"""What a training step asks of a GPU, counted on a CPU: kernels a layer, bytes kept, no waiting."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.config import DpoConfig
from dpo_cli.model.attention import interface
from dpo_cli.model.fuse import fuse_gelu
from dpo_cli.stages.dpo import dpo_loss
from small_models import FAMILIES, build, examples, packed
from varlen_on_cpu import register

# Operators that move no data, or only reserve it.
FREE = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze",
    "permute", "as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "unfold",
    "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "lift_fresh", "is_pinned", "unflatten", "is_same_size", "diagonal", "resolve_conj",
}  # fmt: skip
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select"}
LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
register()


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def step_of(family, layers, times=1):
    """Launches by operator, bytes kept for the backward and tokens of a training step in bf16."""
    model = build(family, FAMILIES[family] | {LAYERS[family]: layers, "head_dim": 8}).float()
    fuse_gelu(model)
    interface.use_kernel(model.train(), "varlen")
    batch = interface.prepare_layout(packed(examples(2) * times), "varlen")
    reference = torch.zeros(len(batch.example_ids), 2)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Launches() as launches, saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            out = dpo_loss(model, batch, lambda row: reference, DpoConfig())
        assert not WAITING & launches.counts.keys()  # figures are read after the step
        out.loss_sum.backward()
    return launches.counts, sum(kept.values()), batch.input_ids.numel()


@pytest.mark.parametrize(("family", "most"), [("gpt2", 64), ("llama", 150)])
def test_launches_of_a_layer_and_no_wait(family, most):
    (few, *_), (many, *_) = step_of(family, 2), step_of(family, 4)
    assert not WAITING & (many.keys() | few.keys())
    assert 20 < (many - few).total() / 2 <= most
    assert few["_varlen_attn"] == few["_varlen_attn_backward"] == 2


@pytest.mark.parametrize(("family", "most"), [("gpt2", 20), ("llama", 24)])
def test_bytes_a_layer_keeps_of_a_token(family, most):
    """In multiples of a hidden state in bf16."""

    def slope(layers):
        (_, small, few), (_, large, many) = (step_of(family, layers, times) for times in (1, 2))
        return (large - small) / (many - few)

    width = 2 * FAMILIES[family].get("n_embd", FAMILIES[family].get("hidden_size"))
    assert (slope(4) - slope(2)) / 2 <= most * width
