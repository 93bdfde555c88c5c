"""`dpo-run convert FILE`: convert another tool's settings to a dpo-run command.

Reads YAML or JSON of TRL, axolotl and LLaMA-Factory (with its dataset_info.json), and the words of
the DPO reference code. The command goes to stdout; what could not be carried, and why, to stderr.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config.hints import group_keys
from dpo_cli.config.literals import as_override
from dpo_cli.config.peers import CHANGED, SAME, WITHOUT
from dpo_cli.durable.bounded_yaml import read_yaml
from dpo_cli.errors import ConfigError
from dpo_cli.escapes import in_one_line, say
from dpo_cli.workflow.convert_data import Conversion, is_local, read_data

LOSSES = {
    "dpo": "sigmoid", "sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo",
    "nca_pair": "nca", "robust": "robust", "bco_pair": "bco", "sppo_hard": "sppo", "aot": "aot",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "simpo": "simpo",
    "orpo": "orpo", "cpo": "cpo",
}  # fmt: skip
STAGES = {
    "sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward", "reward": "reward",
    "ppo": "ppo-baseline",
}  # fmt: skip
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw",
    "paged_adamw_32bit": "adamw", "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit", "rmsprop": "rmsprop",
}  # fmt: skip
SCHEDULES = {"constant_with_warmup": "constant", "constant": "constant", "linear": "linear",
             "cosine": "cosine"}  # fmt: skip
DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl",
               "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}  # fmt: skip
MODELS = {"pythia28": "pythia-2.8b", "pythia69": "pythia-6.9b", "gptj": "gpt-j-6b",
          "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl"}  # fmt: skip


def convert(words: Sequence[str]) -> int:
    """Print the command for a file, or for words of the DPO reference code."""
    if not words:
        raise ConfigError("convert: give a file of another tool, or the words of its command")
    conversion = converted(*_read(words))
    command = [as_override(key, value) for key, value in conversion.words.items()]
    say(" \\\n  ".join(["dpo-run", *(shlex.quote(in_one_line(word)) for word in command)]))
    done, count = len(conversion.carried), len(conversion.theirs)
    say(f"carried {done} of {count} settings of {conversion.tool}", error=True)
    for name, why in conversion.left.items():
        say(in_one_line(f"  {name}: {why}"), error=True)
    return 0


def _read(words: Sequence[str]) -> tuple[dict[str, Any], Path]:
    if all("=" in word for word in words):
        pairs = (word.partition("=") for word in words)
        try:
            return {key: yaml.safe_load(value) for key, _, value in pairs}, Path()
        except yaml.YAMLError as error:
            raise ConfigError(f"convert: {in_one_line(str(error))}") from error
    path = Path(words[0])
    if len(words) > 1:
        raise ConfigError(f"convert: one file at a time, not also {words[1]}")
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"convert: {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"convert: {path}: has no settings, key: value")
    return {str(key): value for key, value in values.items()}, path.parent


def converted(theirs: dict[str, Any], folder: Path) -> Conversion:
    """The settings as overrides of dpo-run."""
    theirs = {key: _number(value) for key, value in theirs.items() if value is not None}
    if theirs.get("max_steps") == -1:
        del theirs["max_steps"]  # not set
    result = Conversion(_tool(theirs), theirs, folder)
    for part in (_stage, _model, read_data, _lora, _training):
        part(result)
    for name, value in theirs.items():
        if name in SAME:
            result.words.setdefault(SAME[name], value)
            result.carried.add(name)
    for name in [n for n in theirs if n not in result.carried | result.left.keys()]:
        result.left[name] = WITHOUT.get(name) or (
            f"see {CHANGED[name]}" if name in CHANGED else "nothing of dpo-run does this"
        )
    _only_of_stage(result)
    return result


def _number(value: Any) -> Any:
    """A number: YAML 1.1 parses 1e-5 as a string."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _tool(theirs: Mapping[str, Any]) -> str:
    if "base_model" in theirs:
        return "axolotl"
    if "stage" in theirs or "finetuning_type" in theirs:
        return "LLaMA-Factory"
    if "loss" in theirs or (isinstance(theirs.get("datasets"), list) and "lr" in theirs):
        return "the DPO reference code"
    return "TRL"


def _stage(result: Conversion) -> None:
    """The stage and its loss. TRL's file does not name its trainer."""
    stage, loss, words = "dpo", None, result.words
    if result.tool == "axolotl":
        loss = result.first("rl")
        stage = "reward" if result.first("reward_model") else "dpo" if loss else "sft"
    elif result.tool == "LLaMA-Factory":
        stage, loss = str(result.first("stage") or "sft"), result.first("pref_loss")
    elif result.tool == "TRL":
        loss = result.first("loss_type")
        hints = ("beta", "precompute_ref_log_probs", "label_smoothing", "max_prompt_length")
        stage = "kto" if "desirable_weight" in result.theirs else "dpo"
        if loss is None and stage == "dpo" and not any(name in result.theirs for name in hints):
            stage = "sft"
        if loss is None:
            result.left["(trainer)"] = f"not in the file; taken for stage={stage}"
    else:
        loss = result.first("loss")
        stage = "sft" if loss == "sft" else "dpo"
    if loss == "kto" or (stage == "kto" and loss == "kto_pair"):
        stage, loss = "kto", None
    if stage not in STAGES:
        raise ConfigError(f"convert: stage {stage}: nothing of dpo-run does this")
    words["stage"] = STAGES[stage]
    if loss is None or stage != "dpo":
        return
    name = next(n for n in ("rl", "pref_loss", "loss_type", "loss") if n in result.carried)
    if str(loss) in LOSSES:
        words["stage.loss"] = LOSSES[str(loss)]
    else:
        result.drop(name, f"stage.loss has no {loss}")


def _model(result: Conversion) -> None:
    words = result.words
    named = result.first("model_name_or_path", "base_model", "model.name_or_path", "model")
    if isinstance(named, str) and result.tool == "the DPO reference code" and named in MODELS:
        words["model"] = MODELS[named]
    elif isinstance(named, str):
        words["model"] = "custom"
        words["model.path" if is_local(named, result.folder) else "model.hub_id"] = named
    if archive := result.first("model.archive"):
        words["model.path"] = archive
    if reference := result.first("ref_model", "reference_model", "ref_model_name_or_path"):
        words["stage.reference"] = reference
    if result.first("trust_remote_code"):
        words["model.trust_remote_code"] = True


def _lora(result: Conversion) -> None:
    words = result.words
    kind = result.first("adapter", "finetuning_type")
    bits = result.first("quantization_bit")
    four = bool(result.first("load_in_4bit")) or bits == 4 or kind == "qlora"
    eight = bool(result.first("load_in_8bit")) or bits == 8
    if not (kind in ("lora", "qlora") or result.first("use_peft")):
        if kind not in (None, "full"):
            result.drop("finetuning_type", f"lora has no {kind}")
        return
    words["lora"] = "qlora" if four else "int8" if eight else "lora"
    target = result.first("lora_target_modules", "lora_target")
    if result.first("lora_target_linear") or target in ("all", "all-linear"):
        target = ["all-linear"]
    if isinstance(target, str):
        target = [part.strip() for part in target.split(",")]
    if target:
        words["lora.target_modules"] = list(target)


def _training(result: Conversion) -> None:
    """Batch, precision, optimizer and schedule."""
    words = result.words
    size = result.first("per_device_train_batch_size", "micro_batch_size", "batch_size")
    steps = result.first("gradient_accumulation_steps")
    if size is not None:
        whole = result.tool == "the DPO reference code"
        words["train.batch_size"] = int(size) * (1 if whole else int(steps or 1))
    if result.first("bf16") in (True, "true"):
        words["hardware.precision"] = "bf16"
    if result.first("fp16"):
        result.drop("fp16", "log-probs overflow in fp16; use hardware.precision=bf16")
    if result.first("gradient_checkpointing"):
        words["hardware.activation_checkpointing"] = 1
    for name in ("optim", "optimizer"):
        result.choose("optim", name, OPTIMIZERS)
    for name in ("lr_scheduler_type", "lr_scheduler"):
        result.choose("optim.schedule", name, SCHEDULES)
    result.choose("stage.divergence", "f_divergence_type", DIVERGENCES)
    betas = [result.first("adam_beta1"), result.first("adam_beta2")]
    if any(beta is not None for beta in betas):
        words["optim.betas"] = [0.9 if betas[0] is None else betas[0],
                                0.999 if betas[1] is None else betas[1]]  # fmt: skip
    trackers = result.first("report_to")
    if trackers is not None:
        words["logger.wandb"] = "wandb" in str(trackers)


def _only_of_stage(result: Conversion) -> None:
    """Drop what the stage does not read, or what the tool gives as a fraction of the run."""
    stage = result.words["stage"]
    known = set(group_keys("stage", stage))
    for name in [*result.theirs]:
        ours = SAME.get(name, "")
        if name in result.carried and ours.startswith("stage.") and ours not in known:
            result.words.pop(ours, None)
            result.drop(name, f"stage={stage} has no {ours.removeprefix('stage.')}")
        elif ours.endswith("_steps") and 0 < float(result.theirs[name]) < 1:
            result.words.pop(ours, None)
            result.drop(name, f"a share of the run; {ours} is a number of steps")
        elif ours.endswith("_steps") and name in result.carried:
            result.words[ours] = int(result.theirs[name])
