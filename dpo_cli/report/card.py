"""README.md of a trained model, in the Hugging Face model card format."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.config import LOSS_FACTS, STAGES
from dpo_cli.durable import write_bytes
from dpo_cli.report.console import brief
from dpo_cli.report.files import command_line, encode, redact, to_yaml, without_home

_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
# Not AutoPeftModel: it cuts an embedding with rows to spare down to the tokenizer's size.
_ADAPTER_USAGE = """\
{torch}from peft import PeftConfig, PeftModel
from transformers import {auto}, AutoTokenizer{quantised}

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
adapter = PeftConfig.from_pretrained(folder)  # it names its base
base = {auto}.from_pretrained(
    adapter.base_model_name_or_path,
    revision=adapter.revision,
{options})
model = PeftModel.from_pretrained(base, folder)
"""
_BITS = {  # as the base was stored in training, see model/quantise.py
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

_DPO_PAPER = """\
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning
               and Stefano Ermon and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}
"""


def write_model_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write README.md beside the weights in `folder`. Raises DiskError.

    facts (all but `stage` may be left out):
        stage: "sft", "dpo" or "reward"; name: title of the model; chat: whether prompts are chats
        adapter: whether the folder holds an adapter, whose own files name its base
        model, data: where they came from; of each `hub_id`, `revision`, `path` and `name`,
            and of the data whatever else describes it (`fingerprint`, `train_rows`, ...)
        command: the arguments of the command line, in a list
        config: the settings that matter, nested as in the YAML
        results: metric -> number; versions: package -> version

    Hub ids go into the metadata only where no local `path` was used instead. Secrets are
    taken out, and the home folder is written `~`.
    """
    facts = _as_saved(folder, facts)
    clean = without_home(redact({**facts, "command": command_line(facts.get("command", ()))}))
    write_bytes(folder / "README.md", encode(_front_matter(clean) + _body(clean)))


def _as_saved(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with what the saved files know better: an adapter's base, which is not always
    what `model` names, and the reference; learning rates without the noise of their product."""
    config, model = facts.get("config") or {}, facts.get("model") or {}
    reference = _read(folder / "dpo_run.json").get("reference")
    if reference and "reference" in config.get("stage", {}):
        config = {**config, "stage": {**config["stage"], "reference": reference}}
    made = _read(folder / "adapter_config.json") if facts.get("adapter") else {}
    if named := made.get("base_model_name_or_path"):
        where = "path" if Path(named).is_absolute() else "hub_id"
        model = {"name": model.get("name"), where: named, "revision": made.get("revision")}
    return {**facts, "model": model, "config": _round_rates(config)}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _round_rates(config: Mapping[str, Any]) -> dict[str, Any]:
    """1e-5 for 9.999999999999999e-06."""
    return {
        key: _round_rates(value) if isinstance(value, Mapping)
        else float(f"{value:g}") if key.endswith("lr") and isinstance(value, float)
        else value
        for key, value in config.items()
    }  # fmt: skip


def _front_matter(facts: Mapping[str, Any]) -> str:
    base, data = _hub_id(facts.get("model")), _hub_id(facts.get("data"))
    if facts.get("adapter"):
        base = base or (facts.get("model") or {}).get("path")
    fields = {
        "base_model": base,
        "datasets": [data] if data else None,
        "library_name": "peft" if facts.get("adapter") else "transformers",
        "pipeline_tag": (
            "text-classification" if facts["stage"] == "reward" else "text-generation"
        ),
        "tags": [facts["stage"], "dpo-run"],
        "generated_from": "dpo-run",
    }
    return f"---\n{to_yaml({key: value for key, value in fields.items() if value})}---\n\n"


def _hub_id(source: Mapping[str, Any] | None) -> str | None:
    return source.get("hub_id") if source and not source.get("path") else None


def _method(facts: Mapping[str, Any]) -> str:
    """What the model is the result of: the loss's words, else the stage's."""
    stage, spec = facts["stage"], STAGES.get(facts["stage"])
    loss = ((facts.get("config") or {}).get("stage") or {}).get("loss")
    if stage == "dpo" and loss in LOSS_FACTS:
        return LOSS_FACTS[loss].method
    return (spec.method or spec.title) if spec else str(stage)


def _body(facts: Mapping[str, Any]) -> str:
    method = _method(facts)
    base = _origin(facts.get("model"))
    if facts.get("adapter"):
        path = (facts.get("model") or {}).get("path")
        base = f"An adapter (PEFT) of {_inline(path) if path else base}"
    sections = [
        f"# {_inline(facts.get('name') or 'A model of dpo-run')}\n",
        f"{base} after {method} on {_origin(facts.get('data'))}, trained with `dpo-run`.\n",
        "## Usage\n\n" + _fenced(_usage(facts), "python"),
        "## Results\n\n" + _table("metric", "value", facts.get("results")),
        "## Data\n\n" + _table("", "", facts.get("data")),
        "## Base model\n\n" + _table("", "", facts.get("model")),
        "## Training\n\n" + _training(facts),
        "## Versions\n\n" + _table("package", "version", facts.get("versions")),
    ]
    if facts["stage"] == "dpo":
        sections.append("## Citation\n\n" + _fenced(_DPO_PAPER, "bibtex"))
    # a heading alone: nothing is known for that section
    return "\n".join(section for section in sections if not section.endswith("\n\n"))


def _usage(facts: Mapping[str, Any]) -> str:
    chat = bool(facts.get("chat"))
    adapter = facts.get("adapter")
    if facts["stage"] == "reward":
        loaded = _adapter_usage(facts) + _PADDING if adapter else _REWARD_USAGE
        texts = _ANSWERS + (_REWARD_CHATS if chat else _REWARD_TEXTS)
        return loaded + texts + _SCORE.format(special=not chat)
    loaded = _adapter_usage(facts) if adapter else _USAGE
    return loaded + (_CHAT_PROMPT if chat else _TEXT_PROMPT) + _GENERATE


def _adapter_usage(facts: Mapping[str, Any]) -> str:
    """The base as it was in training, and the adapter on it."""
    reward, lora = facts["stage"] == "reward", (facts.get("config") or {}).get("lora") or {}
    bits = _BITS.get(str(lora.get("quantization")), "")
    return _ADAPTER_USAGE.format(
        torch="import torch\n" if reward or "torch." in bits else "",
        auto="AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM",
        quantised=", BitsAndBytesConfig" if bits else "",
        options="    num_labels=1,\n" * reward + bits,
    )


def _origin(source: Mapping[str, Any] | None) -> str:
    """Name of a model or dataset; a hub id with its revision, of a path the last part."""
    source = source or {}
    if hub_id := _hub_id(source):
        revision = source.get("revision")
        return _inline(f"{hub_id} (revision {revision})" if revision else hub_id)
    name = Path(source["path"]).name if source.get("path") else source.get("name")
    return _inline(name or "unnamed")


def _training(facts: Mapping[str, Any]) -> str:
    command = _fenced(facts["command"] + "\n", "bash") if facts["command"] else ""
    config = _fenced(to_yaml(facts["config"]), "yaml") if facts.get("config") else ""
    return "\n".join(filter(None, (command, config)))


def _table(left: str, right: str, rows: Mapping[str, Any] | None) -> str:
    shown = [(key, value) for key, value in (rows or {}).items() if value is not None]
    if not shown:
        return ""
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    lines += [f"| {_inline(key)} | {_inline(value)} |" for key, value in shown]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """One line of Markdown text: no HTML, no markup, no table border of the user's making."""
    text = " ".join(brief(value).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(text, quote=False))


def _fenced(text: str, language: str) -> str:
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max([3, *(length + 1 for length in runs)])
    return f"{fence}{language}\n{text}{fence}\n"
