"""Packed rows against each model family's own forward, one sequence at a time."""

import pytest
import torch

from dpo_cli.errors import ConfigError, NonFiniteError
from dpo_cli.model import forward
from dpo_cli.model.attention import grouped, interface, probe
from dpo_cli.model.attention.grouped import Group, GroupedLayout
from dpo_cli.model.attention.interface import Placement, kernel_of, use_kernel
from dpo_cli.model.attention.kernels import Call
from dpo_cli.model.attention.layouts import PaddedLayout
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.records import EncodedExample, Segment
from small_models import (
    FAMILIES,
    SMALL,
    assert_loss_and_gradients_are_the_plain_ones,
    build,
    compute_in_float64,
    examples,
    oracle,
    packed,
    sequences,
)

GPT_NEO = {
    "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0,
    "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
# Families that ignore a registered attention, need what it lacks, or count positions their own
# way: name, family, configuration, the kernel that is right, what the note says of the others.
UNUSUAL = [
    ("falcon", "falcon", {**SMALL, "multi_query": True}, "dense", "grouped: it ignores"),
    ("falcon-alibi", "falcon", {**SMALL, "alibi": True}, "plain", "grouped: it ignores"),
    ("gpt_neo", "gpt_neo", GPT_NEO, "plain", "dense: its windows count rows"),
    ("gptj", "gptj", FAMILIES["gptj"], "dense", "grouped: it ignores"),
    ("opt", "opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
     "grouped", None),
    ("bloom", "bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4,
     "bos_token_id": 0, "eos_token_id": 0}, "plain", "grouped: it ignores"),
    ("gpt_oss", "gpt_oss", {**SMALL, "head_dim": 8, "sliding_window": 6, "num_local_experts": 3,
     "num_experts_per_tok": 2}, "plain", "grouped: it has attention sinks"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _float64_inside_the_models(monkeypatch):
    compute_in_float64(monkeypatch)


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_plain_forward(family, branches):
    model = build(family)
    choose_attention(model, "auto", on=Placement(note=lambda line: None))
    assert_loss_and_gradients_are_the_plain_ones(model, examples(branches))


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "family"),
    [(k, f) for k in ("sdpa", "dense", "plain") for f in ("gpt2", "llama", "gptj")
     if (k, f) != ("sdpa", "gptj")],
)  # fmt: skip
def test_the_slow_ways_are_exact_as_well(family, kernel, branches):
    model = build(family)
    choose_attention(model, kernel)
    assert kernel_of(model) == kernel
    assert_loss_and_gradients_are_the_plain_ones(model, examples(branches))


@pytest.mark.parametrize("saved_bytes", [0, 2048])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "mistral"])
def test_blocks_of_queries_change_nothing(family, saved_bytes, monkeypatch):
    """Neither their size nor whether probabilities are kept or worked out again."""
    monkeypatch.setattr(grouped, "BLOCK", 3)
    monkeypatch.setattr(grouped, "SAVED_BYTES", saved_bytes)
    model = build(family)
    choose_attention(model, "grouped")
    assert_loss_and_gradients_are_the_plain_ones(model, examples(3))


def test_examples_of_similar_length_are_grouped():
    """Sizes 8, 7, 5, 1: 7 is close to 8, 5 and 1 are not to their longest."""
    segments = [
        Segment(0, 4, (1,)),
        Segment(5, 3, (2, 3)),
        Segment(13, 1, ()),
        Segment(14, 2, (5,)),
    ]
    groups = GroupedLayout.build(segments).groups
    assert [g.rows.tolist() for g in groups] == [
        [*range(5, 13), *range(14, 21)], [0, 1, 2, 3, 4], [13]
    ]  # fmt: skip
    assert groups[0].places.tolist() == [*range(15)]  # the last of 16 places is padding
    assert groups[1].places is None


@pytest.mark.parametrize("kernel", ["grouped", "sdpa", "dense", "plain"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hidden_states_of_rows_that_keep_their_last_tokens(family, kernel):
    model, rows = build(family), examples(4)
    use_kernel(model, kernel)
    batch = packed(rows, keep_last=True)
    with torch.no_grad():
        got = forward.hidden_states(model, batch).index_select(0, batch.last_index)
        model.set_attn_implementation("eager")
        expected = torch.cat([
            model.base_model(torch.cat([p, r])[None]).last_hidden_state[0, -1:]
            for p, r in sequences(rows)
        ])  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "options", "kernel", "said"),
    [case[1:] for case in UNUSUAL],
    ids=[case[0] for case in UNUSUAL],
)
def test_unusual_families_are_right_and_say_what_it_costs(family, options, kernel, said):
    model, rows, notes = build(family, options), examples(2), []
    expected = oracle(model, rows)
    choose_attention(model, "auto", on=Placement(note=notes.append), key="stage.reference")
    assert kernel_of(model) == kernel
    got = forward.token_logprobs(model, packed(rows))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert_loss_and_gradients_are_the_plain_ones(model, rows)
    if said is None:
        assert notes == []
        return
    (note,) = notes
    assert note.startswith(f"stage.reference: {type(model).__name__} runs with attention={kernel}")
    assert "slower than packed, at most " in note
    assert said in note


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_an_encoder_is_refused(family):
    model = build(family, {**SMALL, "max_position_embeddings": 80})
    with pytest.raises(ConfigError, match=r"^\w+ is not a causal language model as .*\.path$"):
        choose_attention(model, "auto")


def test_a_family_that_nothing_suits_is_refused():
    """None of the usual ones: here the oracle itself is off."""
    model = build("llama")
    real = forward.padded_token_logprobs
    with pytest.raises(ConfigError, match=r"^model\.attention=auto: Llama.*plain: its values.*$"):
        choose_attention(model, "auto", lambda *a: real(*a) + 0.01)


@pytest.mark.parametrize(("family", "choice"), [("gptj", "sdpa"), ("mistral", "dense")])
def test_a_choice_that_would_be_wrong_is_refused(family, choice):
    line = rf"^model\.attention={choice}: .*ForCausalLM cannot be used \({choice}: .*\)$"
    with pytest.raises(ConfigError, match=line):
        choose_attention(build(family), choice)


def test_gradients_are_compared_as_well(monkeypatch):
    """A backward that forgets the keys: log-probabilities alone would not show it."""
    real = PaddedLayout.attend
    monkeypatch.setattr(
        PaddedLayout, "attend", lambda self, q, k, v, call: real(self, q, k.detach(), v, call)
    )
    with pytest.raises(ConfigError, match=r"its gradients differ .*%"):
        choose_attention(build("llama"), "sdpa")


def test_gradients_that_are_not_numbers_are_found(monkeypatch):
    """Of one vector of weights among many, behind values that are right."""
    real = probe._Trial._figures

    def spoiled(self, values):
        figures = real(self, values)
        if interface.kernel_of(self.model) == "sdpa":
            figures.gradients[-1].fill_(float("nan"))
        return figures

    monkeypatch.setattr(probe._Trial, "_figures", spoiled)
    with pytest.raises(ConfigError, match=r"its gradients differ from the plain forward's by nan%"):
        choose_attention(build("llama"), "sdpa")


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_weights_that_are_not_numbers_are_named(kernel):
    """They are no kernel's fault, and exit code 4."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is"):
        choose_attention(model, kernel)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_values_in_float32_stay_so_under_autocast(softcap):
    layout = GroupedLayout.build([Segment(0, 3, (2,)), Segment(5, 2, (1,))])
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    expected = layout.attend(q, k, v, Call(softcap=softcap))
    with torch.autocast("cpu", torch.bfloat16):
        got = layout.attend(q, k, v, Call(softcap=softcap))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    got.sum().backward()
    assert q.grad.dtype == q.dtype


def test_windows_longer_than_the_probe_are_tried_all_the_same(monkeypatch):
    model = build("mistral", {**FAMILIES["mistral"], "sliding_window": 40})
    real = Group.visible
    monkeypatch.setattr(Group, "visible", lambda self, window: real(self, None))
    choose_attention(model, "auto", on=Placement(note=lambda line: None))
    assert kernel_of(model) == "plain"
    assert model.config.sliding_window == 40


@pytest.mark.parametrize(
    ("choice", "on", "why"),
    [
        ("varlen", Placement(), r"needs a CUDA device"),
        ("flex", Placement(), r"needs a CUDA device"),
        ("varlen", Placement(torch.device("cuda")), r"set hardware\.precision=bf16"),
    ],
)
def test_what_the_machine_lacks_is_refused_before_the_weights_are_read(choice, on, why):
    with pytest.raises(ConfigError, match=rf"^model\.attention={choice}: .*{why}.*$"):
        choose_attention(None, choice, on=on)


def test_a_branch_does_not_see_its_sibling():
    model, rows = build("llama"), examples(2)
    choose_attention(model, "auto")
    before = forward.sequence_logprobs(model, packed(rows))
    other = rows[1].response_ids[0][::-1].copy()
    changed = [rows[0], EncodedExample(rows[1].prompt_ids, (other, rows[1].response_ids[1]), 1)]
    after = forward.sequence_logprobs(model, packed([*changed, rows[2]]))
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(after[keep], before[keep], rtol=0, atol=1e-12)
