"""Rotary factors that depend on a sequence's length: each sequence by its own, as when alone."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import small_tokenizers
from dpo_cli.errors import ConfigError
from dpo_cli.model import forward, rope
from dpo_cli.model.attention import interface
from dpo_cli.model.attention.interface import Placement, kernel_of
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.classifier import Classifier
from dpo_cli.model.reward import rewards
from dpo_cli.model.sampling import generate, trial
from dpo_cli.model.sampling.generate import SamplingOptions, sample
from dpo_cli.packing import pack, pack_all, pack_sorted
from dpo_cli.records import EncodedExample
from small_models import (
    SMALL,
    assert_loss_and_gradients_are_the_plain_ones,
    build,
    compute_in_float64,
    examples,
    packed,
    sequences,
)
from small_runs import configure, metrics
from small_runs import run as run_stage

CUT = 11  # tokens: `examples` has sequences of 2, 6, 11, 12 and more
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 8.0, 16.0], "original_max_position_embeddings": CUT,
}  # fmt: skip
FAMILIES = {
    "phi3": {**SMALL, "rope_parameters": LONGROPE, "original_max_position_embeddings": CUT},
    "phimoe": {
        **SMALL, "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.6},
        "original_max_position_embeddings": CUT, "num_local_experts": 3,
        "attention_dropout": 0.0, "router_jitter_noise": 0.0,
    },
    "llama": {**SMALL, "rope_parameters": LONGROPE},
}  # fmt: skip


@pytest.fixture
def in_float64(monkeypatch):
    compute_in_float64(monkeypatch)


def ids(*lengths):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 96, n).astype(np.int32) for n in lengths]


def sharp(model):
    """In float32, with weights for which the factors make nats of difference."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    return model.float()


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_factors_of_their_own_length(in_float64, family, branches):
    model, notes = build(family, FAMILIES[family]), []
    choose_attention(model, "auto", on=Placement(note=notes.append))
    assert (kernel_of(model), notes) == ("grouped", [])
    assert model.config.rope_parameters["original_max_position_embeddings"] == CUT
    rows = examples(branches)
    lengths = {len(p) + len(r) for p, r in sequences(rows)}
    assert min(lengths) <= CUT < max(lengths)
    assert_loss_and_gradients_are_the_plain_ones(model, rows)


@pytest.mark.parametrize("kernel", ["sdpa", "dense", "plain"])
def test_every_way_of_attending(in_float64, kernel):
    model = build("phi3", FAMILIES["phi3"])
    choose_attention(model, kernel)
    assert_loss_and_gradients_are_the_plain_ones(model, examples(3))


@pytest.mark.parametrize("kernel", ["grouped", "plain"])
def test_the_last_token_counts_for_the_length(in_float64, kernel):
    """Though it predicts nothing and is left out of other rows."""
    model = build("phi3", FAMILIES["phi3"])
    interface.use_kernel(model, kernel)
    prompt, at, beyond = ids(4, CUT - 4, CUT - 3)
    for responses in ((at,), (beyond,), (at, beyond), (beyond, at)):
        rows = [EncodedExample(prompt, responses, 0)]
        assert_loss_and_gradients_are_the_plain_ones(model, rows)


def test_the_factors_matter_here(in_float64):
    """Or the tests above would hold for rows that are not cut, too."""
    model = build("phi3", FAMILIES["phi3"])
    interface.use_kernel(model, "sdpa")
    row = examples(2)
    right = forward.token_logprobs(model, packed(row, cuts=(CUT,)))
    uncut = packed(row)
    with pytest.raises(AssertionError, match="cuts_of"):
        forward.token_logprobs(model, uncut)
    uncut.cuts = (CUT,)  # its segments are cut nowhere
    uncut.layouts["sdpa"] = interface.LAYOUTS["sdpa"].build(uncut.layout)
    assert (forward.token_logprobs(model, uncut) - right).abs().max() > 5e-3


def test_a_prompt_lies_twice_where_its_responses_lie_on_both_sides():
    prompt, short, long = ids(4, 3, 9)
    batch = pack([EncodedExample(prompt, (long, short, long), 7)], [7], cuts=(CUT,))
    assert [(s.prompt, s.branches) for s in batch.layout] == [(4, (3,)), (4, (9, 9))]
    assert batch.counts == (21,)
    assert batch.sequence_lengths.tolist() == [9, 3, 9]
    last = [batch.input_ids[i].item() for i in batch.last_index]
    assert last == [long[-1], short[-1], long[-1]]
    assert batch.position_ids[batch.last_index].tolist() == [12, 6, 12]


def test_rows_without_long_sequences_are_packed_as_ever():
    prompt, short = ids(4, 3)
    rows = [EncodedExample(prompt, (short, short), i) for i in range(3)]
    for pack_rows in (
        lambda *a: pack_all(rows, [0, 1, 2], 12, *a),
        lambda *a: pack_sorted(rows, 12, *a),
    ):
        for cut, plain in zip(pack_rows(False, (CUT,)), pack_rows(False), strict=True):
            assert torch.equal(cut.input_ids, plain.input_ids)
            assert cut.layout == plain.layout
            assert cut.last_index is None


def test_rewards(in_float64):
    config = build("phi3", {**FAMILIES["phi3"], "num_labels": 1}).config
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    rows = [
        EncodedExample(e.prompt_ids, tuple(np.maximum(r, 1) for r in e.response_ids), e.row)
        for e in examples(3)
    ]
    interface.use_kernel(model, "sdpa")
    got = rewards(model, packed(rows, keep_last=True, cuts=(CUT,)))
    model.set_attn_implementation("eager")
    expected = [model(input_ids=torch.cat(pair)[None]).logits.squeeze() for pair in sequences(rows)]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-10)


def test_a_classifier_of_texts_of_many_lengths():
    config = build("phi3", {**FAMILIES["phi3"], "vocab_size": 102}).config
    config.num_labels, config.pad_token_id = 2, 100
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = small_tokenizers.words()
    texts = [" ".join(f"w{n + i}" for i in range(n)) for n in (2, CUT, CUT + 1, 20)]
    found = Classifier(model, tokenizer, 100, 64, 8).logits(texts)
    expected = [
        model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0] for text in texts
    ]
    torch.testing.assert_close(found.float(), torch.stack(expected), rtol=0, atol=1e-5)


def test_several_devices_refuse_what_they_would_do_apart():
    prompt, short, long = ids(4, 3, 9)
    rope.refuse_beyond_cuts([EncodedExample(prompt, (short,), 0)], (CUT,))
    rope.refuse_beyond_cuts([EncodedExample(prompt, (short, long), 0)], ())
    with pytest.raises(
        ConfigError, match=r"^row 3 is longer than .* 11 tokens .*data\.max_length=11 .*$"
    ):
        rope.refuse_beyond_cuts([EncodedExample(prompt, (short, long), 3)], (CUT,))


def test_policy_and_reference_are_one_at_first(tmp_path):
    """A run on pairs of a short chosen and a long rejected response, and the other way round."""
    torch.manual_seed(0)
    model = sharp(build("phi3", {**FAMILIES["phi3"], "vocab_size": 102, "eos_token_id": 100}))
    model.save_pretrained(tmp_path / "model")
    tokenizer = small_tokenizers.words()
    tokenizer.save_pretrained(tmp_path / "model")
    say = lambda n: " " + " ".join(f"w{n + i}" for i in range(n))  # noqa: E731
    lengths = [(4, 5), (4, 20), (20, 4), (9, 10), (10, 9), (30, 31)]
    pairs = [{"prompt": "w1 w2", "chosen": say(c), "rejected": say(r)} for c, r in lengths]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = configure(
        "stage=dpo", "model=custom", f"model.path={tmp_path}/model", "data=jsonl",
        f"data.path={tmp_path}/pairs.jsonl", "hardware=cpu", "logger=none", "train.batch_size=1",
        "train.sample_prompts=0", "train.shuffle=false", "optim.lr=1e-12",
        f"run_dir={tmp_path}/run",
    )  # fmt: skip
    run_stage(config, ["dpo-run"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()

    def logp(prompt, response):
        start = torch.tensor(tokenizer(prompt).input_ids)
        rest = torch.tensor([*tokenizer(response).input_ids, 100])
        with torch.no_grad():
            return float(forward.padded_token_logprobs(plain, start, rest).sum())

    steps = [row for row in metrics(tmp_path / "run") if "logps/chosen" in row]
    assert len(steps) == len(pairs)
    for row, pair in zip(steps, pairs, strict=True):
        for side in ("chosen", "rejected"):
            assert row[f"logps/{side}"] == pytest.approx(logp(pair["prompt"], pair[side]), abs=1e-3)
            assert row[f"logratios/{side}"] == pytest.approx(0.0, abs=1e-4)


def greedily(model, prompt, steps):
    """A forward of the whole text for each token."""
    text = prompt.tolist()
    with torch.no_grad():
        for _ in range(steps):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def sampled_greedily(model, prompts, steps, completions=2):
    options = SamplingOptions(
        completions, temperature=0.0, max_new_tokens=steps, batch_size=completions * len(prompts)
    )
    return sample(model, prompts, options, ends=-1, pad_id=0, note=lambda line: None)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", ["shared_prefix", "repeated", "same_length", "uncached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_that_grow_beyond_the_original_length(monkeypatch, family, mode, static):
    """Short, about to cross, at the edge, beyond: decoded together, each as if it were alone."""
    model = sharp(build(family, FAMILIES[family]))
    monkeypatch.setitem(generate.STATIC, "cpu", static and mode == "shared_prefix")
    setattr(model, trial.DECODING_MODE, mode)
    prompts = ids(2, 2, 7, 7, CUT - 1, CUT, CUT + 1, CUT + 4, 3)
    steps = 12
    for prompt, made in zip(prompts, sampled_greedily(model, prompts, steps), strict=True):
        expected = greedily(model, prompt, steps)
        for completion in made:
            assert completion.ids.tolist() == expected


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_samples_are_those_of_generate(family):
    """Which starts its cache anew where these families cross."""
    model = sharp(build(family, FAMILIES[family]))
    prompts, steps = ids(3, 7, CUT, CUT + 2), 10
    found = sampled_greedily(model, prompts, steps, completions=1)
    for prompt, (made,) in zip(prompts, found, strict=True):
        given = torch.from_numpy(prompt).long()[None]
        text = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=steps,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert made.ids.tolist() == text[0, len(prompt) :].tolist()


def test_finished_rows_drop_out_before_and_after_the_crossing():
    """Sampled, with log-probabilities: those of a forward of the finished text, where it is on
    one side; of the text up to each token where it is on both."""
    torch.manual_seed(0)
    model = build("phi3", FAMILIES["phi3"]).float()
    (prompt,) = ids(CUT - 3)
    options = SamplingOptions(40, max_new_tokens=9, seed=3, batch_size=40)
    ends = list(range(24))
    (made,) = sample(model, [prompt], options, ends, pad_id=0, note=lambda line: None)
    assert {len(c.ids) for c in made} >= {1, 2, 3, 4, 5, 9}
    for completion in made:
        text = [*prompt.tolist(), *completion.ids.tolist()]
        for n, value in enumerate(completion.logprobs):
            with torch.no_grad():
                logits = model(torch.tensor([text[: len(prompt) + n]]), use_cache=False).logits
            expected = logits[0, -1].log_softmax(-1)[text[len(prompt) + n]]
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
