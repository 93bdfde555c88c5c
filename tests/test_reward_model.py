"""Reward models: rewards and gradients against transformers' own forward, heads, padding."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import small_tokenizers
from dpo_cli.errors import ConfigError
from dpo_cli.model import reward
from dpo_cli.model.attention.interface import PACKED, kernel_of
from dpo_cli.model.attention.probe import choose_attention
from dpo_cli.model.load import load_model, load_tokenizer
from dpo_cli.packing import pack
from dpo_cli.records import EncodedExample
from small_runs import configure, train
from test_attention import FAMILIES


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "sft"
    train(folder, "stage=sft", "train.max_steps=1")
    return folder


@pytest.fixture(scope="module")
def trained(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    train(folder, "stage=reward", "train.max_steps=1", f"model.path={sft}",
          "stage.normalize_prompts=0")  # fmt: skip
    return folder


NAMES = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gptj")
EOS = 0
PROMPTS, RESPONSES = [1, 9, 4], [(5, 7, 1, 2), (1, 3, 4, 9), (12, 2, 3, 3)]


@pytest.fixture
def _float64_inside_the_models(monkeypatch):
    """Norms and rotary embeddings ask for float32 by name; give them float64 here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(family, pad):
    torch.manual_seed(1)
    options = {**FAMILIES[family], "pad_token_id": pad, "num_labels": 1}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():  # larger weights than at initialisation: attention must matter
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.double().eval()


def ended_examples(branches):
    """Ragged; all but one response end with EOS, and one is nothing else."""
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(1, 90, n).astype(np.int32)  # noqa: E731
    ended = lambda n: np.append(ids(n - 1), np.int32(EOS))  # noqa: E731
    rows = [
        EncodedExample(ids(p), tuple(ended(r) for r in lengths[:branches]), i)
        for i, (p, lengths) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    cut = (ids(6), *rows[2].response_ids[1:])
    return [*rows[:2], EncodedExample(rows[2].prompt_ids, cut, 2)]


def padded_rewards(model, rows, pad):
    """transformers' own forward on a batch padded on the right. (S,)"""
    sequences = [np.concatenate([e.prompt_ids, r]) for e in rows for r in e.response_ids]
    ids = torch.full((len(sequences), max(map(len, sequences))), pad)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    model.set_attn_implementation("eager")
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*runs with attention=dense")  # GPT-J
@pytest.mark.usefixtures("_float64_inside_the_models")
@pytest.mark.parametrize("branches", [2, 4])
@pytest.mark.parametrize("pad", [EOS, 95], ids=["pad is EOS", "pad of its own"])
@pytest.mark.parametrize("family", NAMES)
def test_rewards_and_every_gradient_equal_the_padded_forward(family, pad, branches):
    model, rows = build(family, pad), ended_examples(branches)
    expected = padded_rewards(model, rows, pad)
    coefficients = torch.linspace(-1.0, 2.0, len(expected), dtype=expected.dtype)
    expected_grads = gradients(model, (expected * coefficients).sum())
    choose_attention(model, "auto", reward._plain_reward, reward._packed_rewards)
    assert (kernel_of(model) in PACKED) == (family != "gptj")
    batch = pack(reward.without_padding(rows, model), [0, 1, 2], keep_last=True)
    got = reward.rewards(model, batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    got_grads = gradients(model, (got * coefficients).sum())
    assert got_grads.keys() == expected_grads.keys()
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.usefixtures("_float64_inside_the_models")
@pytest.mark.parametrize("kernel", ["grouped", "sdpa", "dense", "plain"])
def test_every_attention_reads_the_same_last_token(kernel):
    model, rows = build("llama", EOS), ended_examples(2)
    expected = padded_rewards(model, rows, EOS)
    choose_attention(model, kernel, reward._plain_reward, reward._packed_rewards)
    batch = pack(reward.without_padding(rows, model), [0, 1, 2], keep_last=True)
    torch.testing.assert_close(reward.rewards(model, batch), expected, rtol=0, atol=1e-10)


def test_rewards_are_float32_under_autocast(trained):
    model, _ = load(trained)
    row = pack(ended_examples(2), [0, 1, 2], keep_last=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = reward.rewards(model, row)
    assert low.dtype == torch.float32
    assert not torch.equal(low, low.bfloat16().float())  # no rounding after the head


def load(path, *words):
    config = configure("model=custom", f"model.path={path}", *words).model
    tokenizer = load_tokenizer(config)
    return reward.load_reward_model(config, tokenizer, seed=0), tokenizer


def test_the_head_is_drawn_by_the_seed_alone(sft):
    config = configure("model=custom", f"model.path={sft}").model
    heads = {}
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever was drawn before
        model = reward.load_reward_model(config, load_tokenizer(config), seed)
        heads.setdefault(seed, []).append(model.score.weight.detach())
    assert torch.equal(*heads[0])
    assert not torch.equal(heads[0][0], heads[1][0])
    spread = torch.cat([heads[0][0], heads[1][0]]).std() * math.sqrt(32 + 1)  # d = 32
    assert spread == pytest.approx(1.0, abs=0.25)


def test_the_body_is_the_policys(sft):
    model, _ = load(sft)
    config = configure("model=custom", f"model.path={sft}").model
    policy = load_model(config, load_tokenizer(config))
    for name, value in policy.base_model.state_dict().items():
        assert torch.equal(value, model.base_model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("make", "pad"),
    [
        (small_tokenizers.llama, "<s>"),  # BOS is not EOS and ends nothing
        (small_tokenizers.words, "<unk>"),
        (small_tokenizers.byte_level, "<|endoftext|>"),  # EOS: it has no other
    ],
)
def test_padding_is_no_eos_if_that_can_be_helped(make, pad):
    tokenizer = make()
    tokenizer.pad_token = tokenizer.eos_token  # what loading does for want of another
    assert tokenizer.convert_ids_to_tokens(reward.padding_id(tokenizer)) == pad


def test_padding_is_taken_from_a_token_of_that_name():
    tokenizer = small_tokenizers.llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|right_pad|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    assert reward.padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|right_pad|>")


def test_saved_padding_freezes_no_embedding(tmp_path):
    """Llama builds its embedding with the configuration's padding, here BOS, left out of training:
    a resumed run would leave the weights of BOS as they are, the first one moved them."""
    tokenizer = small_tokenizers.llama()
    shape = {**FAMILIES["llama"], "vocab_size": len(tokenizer), "pad_token_id": None}
    policy = AutoConfig.for_model("llama", **shape)
    AutoModelForCausalLM.from_config(policy).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    bos = tokenizer.bos_token_id
    found = []
    for before, after in (("policy", "first"), ("first", "second")):
        model, loaded = load(tmp_path / before)
        assert model.config.pad_token_id == loaded.pad_token_id == bos
        row = pack([EncodedExample(np.int32([bos, 9]), (np.int32([8, 2]), np.int32([7, 2])), 0)],
                   [0], keep_last=True)  # fmt: skip
        found.append(gradients(model, reward.rewards(model, row).sum()))
        model.save_pretrained(tmp_path / after)
        loaded.save_pretrained(tmp_path / after)
    name = "model.embed_tokens.weight"
    assert found[0][name][bos].abs().max() > 0
    assert torch.equal(found[0][name], found[1][name])


def test_what_is_no_reward_model_is_refused(sft, trained, tmp_path):
    GPT2ForSequenceClassification(GPT2Config(
        vocab_size=1024, n_embd=8, n_layer=1, n_head=1, num_labels=3, bos_token_id=0,
        eos_token_id=0,
    )).save_pretrained(tmp_path / "labels")  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sft / "final" / file, tmp_path / "labels")
    with pytest.raises(
        ConfigError, match=r"^model\.path=\S+: is a classifier with 3 labels, but a"
    ):
        load(tmp_path / "labels")
    config = configure("model=custom", f"model.path={trained}").model
    with pytest.raises(ConfigError, match=r"is a GPT2ForSequenceClassification.*not a policy"):
        load_model(config, load_tokenizer(config))
    shutil.copytree(sft / "final", tmp_path / "family")
    shape = AutoConfig.for_model("granite", **FAMILIES["granite"])
    shape.save_pretrained(tmp_path / "family")
    with pytest.raises(ConfigError, match=r"no sequence-classification model for granite"):
        load(tmp_path / "family")
