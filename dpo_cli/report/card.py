"""README.md of a trained model, in the Hugging Face model card format."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.durable import write_bytes
from dpo_cli.report.console import brief
from dpo_cli.report.files import command_line, encode, redact, to_yaml, without_home

_METHODS = {
    "sft": "supervised fine-tuning",
    "dpo": "Direct Preference Optimization",
    "reward": "training as a reward model",
    "export": "no training that its folder tells of",
}

_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
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
model = AutoModelForSequenceClassification.from_pretrained(folder{labels})
{padding}answers = [" One answer.", " Another."]
"""
_PADDING = "model.config.pad_token_id = tokenizer.pad_token_id\n"
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
        adapter: whether the folder holds an adapter, which transformers reads with PEFT installed
        model, data: where they came from; of each `hub_id`, `revision`, `path` and `name`,
            and of the data whatever else describes it (`fingerprint`, `train_rows`, ...)
        command: the arguments of the command line, in a list
        config: the settings that matter, nested as in the YAML
        results: metric -> number; versions: package -> version

    Hub ids go into the metadata only where no local `path` was used instead. Secrets are
    taken out, and the home folder is written `~`.
    """
    clean = without_home(redact({**facts, "command": command_line(facts.get("command", ()))}))
    write_bytes(folder / "README.md", encode(_front_matter(clean) + _body(clean)))


def _front_matter(facts: Mapping[str, Any]) -> str:
    base, data = _hub_id(facts.get("model")), _hub_id(facts.get("data"))
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


def _body(facts: Mapping[str, Any]) -> str:
    method = _METHODS.get(facts["stage"], facts["stage"])
    base = _origin(facts.get("model"))
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
    if facts["stage"] == "reward":
        texts = _REWARD_CHATS if chat else _REWARD_TEXTS
        usage = _REWARD_USAGE.format(
            labels=", num_labels=1" if facts.get("adapter") else "",
            padding=_PADDING if facts.get("adapter") else "",
        )
        return usage + texts + _SCORE.format(special=not chat)
    return _USAGE + (_CHAT_PROMPT if chat else _TEXT_PROMPT) + _GENERATE


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
