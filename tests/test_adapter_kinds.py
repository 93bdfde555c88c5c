"""Adapters of every kind PEFT writes: merged and trained on as by PEFT, or refused in a line."""

import json
import shutil
import warnings
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dpo_cli.config import LoraConfig, ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.adapters import lora
from dpo_cli.model.adapters.active import REFERENCE, Adaptation, adapter_as
from dpo_cli.model.forward import loss_and_logprobs, sequence_logprobs
from dpo_cli.model.load import count_trained, load_model, load_tokenizer
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.reward import load_reward_model, rewards
from dpo_cli.model.source import origin_of
from dpo_cli.packing import pack
from dpo_cli.session.reference import reference_origin
from small_adapters import plain_logprobs, write_base
from small_models import examples

QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PAIRS = examples(2)
IDS = torch.tensor([[5, 70, 3, 41, 300, 9, 1]])


def low_rank(**how):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": QV, "task_type": "CAUSAL_LM", **how}
    )


TRAINED_ON = {  # merged and trained on
    "rslora": ("llama", low_rank(use_rslora=True)),
    "patterns": ("llama", low_rank(
        layers_to_transform=[1], rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3})),
    "regex": ("llama", low_rank(target_modules=r".*\.0\..*(q_proj|up_proj)")),
    "dora": ("gpt2", low_rank(target_modules=["c_attn"], use_dora=True)),
    "modules to save": ("llama", low_rank(modules_to_save=["embed_tokens", "lm_head"])),
    "experts": ("qwen3_moe", low_rank(target_modules="all-linear")),
    "expert parameters": ("mixtral", low_rank(target_parameters=EXPERTS)),
    "tokens": ("llama", low_rank(trainable_token_indices=[5, 70])),
    "tokens, tied": ("qwen2", low_rank(trainable_token_indices=[5, 70])),
    "tokens, tied, gpt2": ("gpt2", low_rank(
        target_modules=["c_attn"], trainable_token_indices={"wte": [5, 70]})),
    "pissa": ("llama", low_rank(init_lora_weights="pissa")),
    "pissa, gpt2": ("gpt2", low_rank(target_modules=["c_attn"], init_lora_weights="pissa")),
    "olora": ("qwen2", low_rank(init_lora_weights="olora", use_rslora=True)),
    "orthogonal": ("llama", low_rank(init_lora_weights="orthogonal")),
}  # fmt: skip
if find_spec("scipy") and torch.cuda.is_available():  # PEFT quantizes for LoftQ on a GPU alone
    TRAINED_ON["loftq"] = (
        "llama", low_rank(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
    )  # fmt: skip
MERGED = {  # merged, and refused where they would be trained on
    "bias": ("gpt2", low_rank(target_modules=["c_attn"], bias="all"), "has bias=all, which"),
    "mica": ("llama", low_rank(init_lora_weights="mica"), "has init_lora_weights=mica, which"),
    "output layer": ("llama", low_rank(target_modules=["q_proj", "lm_head"]), "includes the outp"),
    "embedding, tied": ("qwen2", low_rank(
        target_modules=["q_proj", "embed_tokens"]), "includes the embedding, which is tied"),
    "both of tied": ("qwen2", low_rank(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), "includes the outp"),
    "one of tied": ("qwen2", low_rank(
        modules_to_save=["lm_head"]), "would be untied: use lora=none"),
    "tokens alone": ("qwen2", peft.TrainableTokensConfig(
        token_indices=[5, 70], task_type="CAUSAL_LM"), "type TRAINABLE_TOKENS, but only LoRA"),
    "loha": ("llama", peft.LoHaConfig(r=2, target_modules=QV), "type LOHA, but only LoRA"),
    "vera": ("llama", peft.VeraConfig(r=4, target_modules=QV), "type VERA, but only LoRA"),
    "vblora": ("llama", peft.VBLoRAConfig(
        r=4, num_vectors=20, vector_length=16, target_modules=QV), "type VBLORA, but only LoRA"),
    "oft": ("llama", peft.OFTConfig(oft_block_size=4, r=0, target_modules=QV), "type OFT, but"),
    "adalora": ("llama", peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=QV), "type ADALORA, but only LoRA"),
}  # fmt: skip
REFUSED = {
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING, learned in"),
    "p-tuning": (peft.PromptEncoderConfig(num_virtual_tokens=2), "type P_TUNING, learned inputs"),
    "prefix tuning": (peft.PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING, learned inp"),
    "alora": (low_rank(alora_invocation_tokens=[5]), "LORA adapter cannot be merged: aLoRA"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}

    def base(family):
        if family not in made:
            made[family] = write_base(folder / family, family)
        return made[family]

    return base


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def written(config, base, target, rows=None):
    """An adapter as its training would leave it: no weight of it is what it began with."""
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(3)
    model = plain(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for weight in wrapped.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        wrapped.save_pretrained(target)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def theirs(base, folder, rows=None, trainable=False):
    model = plain(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def merged(folder):
    return read_pretrained(AutoModelForCausalLM, ModelConfig(path=str(folder)), "model.path")[0]


def loaded(folder, **settings):
    source = ModelConfig(path=str(folder))
    adaptation = Adaptation(LoraConfig(name="lora", **settings))
    return load_model(source, load_tokenizer(source), adaptation=adaptation)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def assert_merged(base, folder, tmp_path, rows=None):
    expected = logits(theirs(base, folder, rows))
    assert (expected[..., :96] - logits(plain(base))[..., :96]).abs().max() > 1e-2
    model = merged(folder)
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert_close(logits(plain(tmp_path / "dense")), expected)


@pytest.mark.parametrize("kind", [*TRAINED_ON, *MERGED])
def test_merged_as_peft_computes(bases, tmp_path, kind):
    family, config, *_ = {**TRAINED_ON, **MERGED}[kind]
    folder = written(config, bases(family), tmp_path / "adapter")
    assert_merged(bases(family), folder, tmp_path)


def sgd(model, loss):
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.grad is not None:
                weight.sub_(weight.grad, alpha=1e-3)
    model.eval()


def assert_trained_on(base, folder, tmp_path, rows=None):
    """One step of gradient descent on the likelihood, by PEFT and here; then saved and read."""
    source = ModelConfig(path=str(folder))
    oracle = theirs(base, folder, rows, trainable=True)
    model = loaded(folder)
    row = pack(PAIRS, range(len(PAIRS)))
    lora.add_reference(model, origin_of(source))
    start = plain_logprobs(oracle, PAIRS)
    assert_close(sequence_logprobs(model, row).view(-1, 2), start)
    trained = [p for p in oracle.parameters() if p.requires_grad]
    tokenizer, settings = load_tokenizer(source), LoraConfig(name="lora")
    assert sum(p.numel() for p in trained) == count_trained(source, tokenizer, settings)
    sgd(oracle, -plain_logprobs.__wrapped__(oracle, PAIRS).sum())
    loss, _ = loss_and_logprobs(model.train(), row, lambda values, _: -values.sum())
    sgd(model, loss)
    after = plain_logprobs(oracle, PAIRS)
    assert (after - start).abs().max() > 1e-2
    assert_close(sequence_logprobs(model, row).view(-1, 2), after)
    with adapter_as(model, REFERENCE):
        assert_close(sequence_logprobs(model, row).view(-1, 2), start)
    (tmp_path / "saved").mkdir()
    lora.save_adapter(model, tmp_path / "saved")
    assert_close(plain_logprobs(theirs(base, tmp_path / "saved", rows), PAIRS), after)
    assert_close(plain_logprobs(merged(tmp_path / "saved"), PAIRS), after)


@pytest.mark.parametrize("kind", TRAINED_ON)
def test_trained_on_as_peft_does(bases, tmp_path, kind):
    family, config = TRAINED_ON[kind]
    folder = written(config, bases(family), tmp_path / "adapter")
    assert_trained_on(bases(family), folder, tmp_path)


@pytest.mark.parametrize("kind", MERGED)
def test_what_is_merged_alone_is_not_trained_on(bases, tmp_path, kind):
    family, config, message = MERGED[kind]
    folder = written(config, bases(family), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(folder)
    assert f"model.path={folder}: " in str(caught.value)
    assert "use lora=none" in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_weights_can_express_is_refused(bases, tmp_path, kind):
    config, message = REFUSED[kind]
    folder = written(config, bases("llama"), tmp_path / "adapter")
    for how in (merged, loaded):
        with pytest.raises(ConfigError, match=message if how is merged else "") as caught:
            how(folder)
        assert f"model.path={folder}: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "pissa_niter_4"])
def test_a_start_that_cannot_be_worked_out_again_is_refused(bases, tmp_path, start):
    folder = written(low_rank(), bases("llama"), tmp_path / "adapter")
    facts = folder / "adapter_config.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "init_lora_weights": start}))
    for how in (merged, loaded):
        with pytest.raises(ConfigError, match=f"init_lora_weights={start}: .*convert it where"):
            how(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_adapter_over_a_resized_embedding(bases, tmp_path, family):
    rows = 1030
    config = low_rank(target_modules=["c_attn"] if family == "gpt2" else QV)
    folder = written(config, bases(family), tmp_path / "adapter", rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    assert_merged(bases(family), folder, tmp_path, rows)
    assert_trained_on(bases(family), folder, tmp_path, rows)
    held = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert rows in {len(value) for value in held.values()}
    source = ModelConfig(path=str(folder))
    adaptation = Adaptation(LoraConfig(name="lora"))
    reward = load_reward_model(source, load_tokenizer(source), adaptation=adaptation)
    files, _ = lora.adapter_files(reward)  # without the output layer, which it has none of
    own = [len(value) for value in files["adapter_model.safetensors"].values()]
    assert own.count(rows) == 1


def test_an_adapter_over_fewer_rows(bases, tmp_path):
    folder = written(low_rank(), bases("qwen2"), tmp_path / "adapter", 1000)
    assert_merged(bases("qwen2"), folder, tmp_path, 1000)
    with pytest.raises(ConfigError, match="has 1024 tokens but the model's embedding has 1000"):
        loaded(folder)


def test_added_tokens_trained_alone(bases, tmp_path):
    config = low_rank(trainable_token_indices=[1024, 1029, 5])
    folder = written(config, bases("qwen2"), tmp_path / "adapter", 1030)
    assert_merged(bases("qwen2"), folder, tmp_path, 1030)
    assert_trained_on(bases("qwen2"), folder, tmp_path, 1030)


def test_a_reward_model_that_peft_saved(bases, tmp_path):
    """PEFT names `classifier` among its modules to save, which no decoder has."""
    auto, base = AutoModelForSequenceClassification, bases("llama")
    build = partial(auto.from_pretrained, base, num_labels=1, dtype=torch.float32)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(build(), low_rank(task_type="SEQ_CLS"))
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    wrapped.save_pretrained(tmp_path / "adapter")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "adapter")
    oracle = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    source = ModelConfig(path=str(tmp_path / "adapter"))
    oracle.config.pad_token_id = None  # a random sequence may end in any token
    row = pack(PAIRS, range(len(PAIRS)), keep_last=True)
    ends = [torch.tensor([[*e.prompt_ids, *r]]).long() for e in PAIRS for r in e.response_ids]
    with torch.no_grad():
        expected = torch.cat([oracle(input_ids=ids).logits[0] for ids in ends])
    for adaptation in (None, Adaptation(LoraConfig(name="lora"))):
        model = load_reward_model(source, load_tokenizer(source), adaptation=adaptation)
        assert_close(rewards(model, row).detach(), expected)


def test_a_policy_adapter_with_an_output_layer_becomes_a_reward_model(bases, tmp_path):
    config = low_rank(modules_to_save=["lm_head"])
    folder = written(config, bases("llama"), tmp_path / "adapter")
    source = ModelConfig(path=str(folder))
    model = load_reward_model(source, load_tokenizer(source))
    expected = theirs(bases("llama"), folder).merge_and_unload().model.state_dict()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_changed_base_is_the_reference_of_its_own_adapter_alone(bases, tmp_path, start):
    """With its adapter off, what is left of a base without its principal part is no policy."""
    base = bases("llama")
    folder = written(low_rank(init_lora_weights=start), base, tmp_path / "adapter")
    policy = SimpleNamespace(peft_config={})
    config = SimpleNamespace(model=ModelConfig(path=str(folder)), stage=SimpleNamespace())
    shared = {}
    for named in (None, str(folder), str(base)):
        config.stage.reference = named
        shared[named] = reference_origin(config, policy) is not None
    assert shared == {None: True, str(folder): True, str(base): start is True}
