"""The code on a model card that loads the model and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
# Not AutoPeftModel: it shrinks a padded embedding to the tokenizer's size.
_ADAPTER_USAGE = """\
{torch}from peft import PeftConfig, PeftModel
from transformers import {auto}, AutoTokenizer{quantized}

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
adapter = PeftConfig.from_pretrained(folder)  # names the base model
base = {auto}.from_pretrained(
    adapter.base_model_name_or_path,
    revision=adapter.revision,
{options})
model = PeftModel.from_pretrained(base, folder)
"""
_BITS = {  # as the base was stored in training, see model/adapters/quantize.py
    "nf4": """\
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
""",
    "int8": "    quantization_config=BitsAndBytesConfig(load_in_8bit=True),\n",
}
_TEXT_PROMPT = """\
inputs = tokenizer("Your prompt", return_tensors="pt")
"""
_CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Your question"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
"""
_GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

_REWARD_USAGE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
"""
_PADDING = "model.config.pad_token_id = tokenizer.pad_token_id\n"
_ANSWERS = 'answers = [" One answer.", " Another."]\n'
_REWARD_TEXTS = """\
texts = ["Your prompt" + answer + tokenizer.eos_token for answer in answers]
"""
_REWARD_CHATS = """\
question = {"role": "user", "content": "Your question"}
chats = [
    tokenizer.apply_chat_template(
        [question, {"role": "assistant", "content": answer.strip()}], tokenize=False
    )
    for answer in answers
]
# the score belongs to the token that ends the answer, whatever the template writes after it
ends = tokenizer.eos_token
texts = [(chat.rpartition(ends)[0] or chat.rstrip()) + ends for chat in chats]
"""
_SCORE = """\
inputs = tokenizer(
    texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens={special}
)
with torch.no_grad():
    print(model(**inputs).logits.squeeze(1))  # the higher, the better
"""


def usage(facts: Mapping[str, Any]) -> str:
    """Python that generates with a policy or scores with a reward model; facts: of the card."""
    chat = bool(facts.get("chat"))
    adapter = facts.get("adapter")
    if facts["stage"] == "reward":
        loaded = _adapter_usage(facts) + _PADDING if adapter else _REWARD_USAGE
        texts = _ANSWERS + (_REWARD_CHATS if chat else _REWARD_TEXTS)
        return loaded + texts + _SCORE.format(special=not chat)
    loaded = _adapter_usage(facts) if adapter else _USAGE
    return loaded + (_CHAT_PROMPT if chat else _TEXT_PROMPT) + _GENERATE


def _adapter_usage(facts: Mapping[str, Any]) -> str:
    """Code that loads the base as in training, and the adapter on top."""
    reward, lora = facts["stage"] == "reward", (facts.get("config") or {}).get("lora") or {}
    bits = _BITS.get(str(lora.get("quantization")), "")
    return _ADAPTER_USAGE.format(
        torch="import torch\n" if reward or "torch." in bits else "",
        auto="AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM",
        quantized=", BitsAndBytesConfig" if bits else "",
        options="    num_labels=1,\n" * reward + bits,
    )
