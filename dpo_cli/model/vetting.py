"""Check the files of a model's folder before a library reads them: which choices they may make, and
how large their numbers may be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_cli.errors import ConfigError
from dpo_cli.escapes import in_one_line

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"  # the latter is PEFT's
TOKENIZER_CONFIG, INDEX = "tokenizer_config.json", "model.safetensors.index.json"
TEMPLATES = "*.jinja", "additional_chat_templates/*.jinja"
MOST_TEMPLATE_BYTES = 2**22
MOST_BYTES = {CONFIG: 2**24, ADAPTER_CONFIG: 2**24, TOKENIZER_CONFIG: 2**26, INDEX: 2**26}

HOLDS_ADAPTER = "contains both an adapter and a model"
# What transformers ships; anything else is code from elsewhere, such as a repository of the hub.
SHIPPED = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}
REFUSED = {
    "quantization_config": "its weights are quantized: use the model before that, with lora=qlora "
    "or lora=int8 to quantize it here",
    "compression_config": "its weights are compressed: use the model before that",
    "transformers_weights": "the weights must be model.safetensors or an index of such files",
    "configuration_files": f"the configuration must be {CONFIG}",
    "fusion_config": "fused layers are not supported: remove the key",
    "kernel_config": "kernels from elsewhere are not run: remove the key",
    "distributed_config": "set hardware.devices instead: remove the key",
}
# -1: none, or the last; not a size.
SENTINEL = re.compile(r"window|ind(?:ex|ices)|idx|offset")
LAYERS, COUNT, SIZE, POSITIONS = 1_000, 2**17, 2**27, 2**31 - 1
BOUNDS = [(re.compile(pattern), most) for pattern, most in (
    (r"layers?(?!_?norm)|(?:^|_)depth", LAYERS),
    (r"label|heads?(?!_?dim)|expert|group|codebook|block|channel", COUNT),
    (r"position|n_ctx|context|max_seq|max_length", POSITIONS),
    (r"size|dim|rank|width|inner|embd|vocab|(?:^|_)d_|ffn|state", SIZE),
)]  # fmt: skip


def vet(folder: Path, where: str) -> None:
    """Raise ConfigError, whose message starts with `where`, for files of a local folder that must
    not be read."""
    if (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{where}: {HOLDS_ADAPTER}: move {ADAPTER_CONFIG} and its weights to another folder"
        )
    if (folder / CONFIG).is_file():
        vet_config(folder / CONFIG, where)
    if (folder / ADAPTER_CONFIG).is_file():
        read_object(folder / ADAPTER_CONFIG, where)
    if (folder / TOKENIZER_CONFIG).is_file():
        read_object(folder / TOKENIZER_CONFIG, where)
    for path in (path for pattern in TEMPLATES for path in folder.glob(pattern)):
        if not path.is_file() or path.stat().st_size > MOST_TEMPLATE_BYTES:
            raise ConfigError(f"{where}: {path.name}: is no file of a few megabytes; remove it")
    if (folder / INDEX).is_file():
        shards(folder / INDEX, where)


def read_object(path: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ConfigError."""
    most = MOST_BYTES.get(path.name, 2**24)
    try:
        if path.stat().st_size > most:
            raise ValueError(f"is larger than {most / 2**20:g} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("must be one JSON object, {...}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(in_one_line(f"{where}: {path.name} cannot be read: {error}")) from None
    return value


def vet_config(path: Path, where: str) -> None:
    """ConfigError for a config.json that names code or files, or has absurd sizes."""
    facts = read_object(path, where)
    names = facts.get("architectures")
    if not _names(names):
        raise ConfigError(
            f"{where}: {path.name}: architectures={str(names)[:80]}: expected a list of names"
        )
    for key, value in entries(facts):
        name = key.rpartition(".")[2]
        why = _choice(name.lstrip("_"), value) or _size(name, value)
        if why:
            raise ConfigError(
                in_one_line(f"{where}: {path.name}: {key[:80]}={str(value)[:80]}: {why}")
            )


def entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested objects, as `a.b`, with their values."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}", value
            yield from entries(value, f"{prefix}{key}.")
    elif isinstance(node, list):
        for value in node:
            yield from entries(value, prefix)


def _choice(name: str, value: Any) -> str | None:
    """Why a key may not have its value."""
    if name in REFUSED and value not in (None, {}, []):
        return REFUSED[name]
    if name not in SHIPPED:
        return None
    chosen = value.values() if isinstance(value, dict) else [value]
    if all(each is None or each in SHIPPED[name] for each in chosen):
        return None
    return (
        f"names code from elsewhere, which is not run: remove the key (attention is chosen by "
        f"model.attention), or write one of {', '.join(SHIPPED[name])}"
    )


def _size(name: str, value: Any) -> str | None:
    """Why a number cannot be a size of a model."""
    if not isinstance(value, int) or isinstance(value, bool) or name.endswith(("_id", "_ids")):
        return None
    most = next((most for pattern, most in BOUNDS if pattern.search(name)), None)
    if most is None or 0 <= value <= most or (value == -1 and SENTINEL.search(name)):
        return None
    return f"must be from 0 to {most:,}"


def _names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


ADAPTER_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("the folder or hub id of the base", lambda v: isinstance(v, str)),
    "revision": ("text", lambda v: isinstance(v, str | None)),
    "peft_type": ("text", lambda v: isinstance(v, str | None)),
    "task_type": ("text", lambda v: isinstance(v, str | None)),
    "target_modules": ("names, or an expression", lambda v: isinstance(v, str) or _names(v)),
    "exclude_modules": ("names, or an expression", lambda v: isinstance(v, str) or _names(v)),
    "layers_pattern": ("names", lambda v: isinstance(v, str) or _names(v)),
    "modules_to_save": ("a list of names", _names),
    "target_parameters": ("a list of names", _names),
    "init_lora_weights": ("true, false or a name", lambda v: isinstance(v, bool | str)),
    "r": ("a rank", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
    "lora_alpha": ("a number", lambda v: isinstance(v, int | float)),
    "lora_dropout": ("from 0 to 1", lambda v: isinstance(v, int | float) and 0 <= v <= 1),
    "rank_pattern": ("names and their ranks", lambda v: v is None or isinstance(v, dict)),
    "alpha_pattern": ("names and their alphas", lambda v: v is None or isinstance(v, dict)),
}
ADAPTER_REFUSED = {
    "megatron_config": "names a library to import",
    "layer_replication": "repeats layers of the base, which is not supported",
}
LONGEST, MOST_NAMES, PLAUSIBLE_RANK = 4096, 10_000, 1024


def vet_adapter(facts: dict[str, Any], largest: int, where: str) -> None:
    """ConfigError for an adapter_config.json with values of the wrong type, that names code, or
    with sizes above those of its weights. largest: dimension of these."""
    where = f"{where}: {ADAPTER_CONFIG}"
    for name, (expected, fits) in ADAPTER_TYPES.items():
        if name in facts and not fits(facts[name]):
            raise ConfigError(
                in_one_line(f"{where}: {name}={str(facts[name])[:80]}: expected {expected}")
            )
    for key, value in entries(facts):
        name, why = key.rpartition(".")[2], None
        rank = key.startswith("rank_pattern.") or name in ("r", "init_r", "target_r", "rank")
        if key in ADAPTER_REFUSED and value:
            why = f"{ADAPTER_REFUSED[key]}: remove the key"
        elif rank and isinstance(value, int) and value > max(largest, PLAUSIBLE_RANK):
            why = f"its weights have at most {largest:,} rows and columns"
        elif isinstance(value, int) and abs(value) > POSITIONS:
            why = "is no plausible number"
        elif isinstance(value, str | list | dict) and len(value) > (
            LONGEST if isinstance(value, str) else MOST_NAMES
        ):
            why = "is too long"
        if why:
            raise ConfigError(in_one_line(f"{where}: {key[:80]}={str(value)[:80]}: {why}"))


def shards(index: Path, where: str) -> list[str]:
    """The file names in an index of weights: safetensors inside its folder, after following links.
    Raises ConfigError."""
    table = read_object(index, where).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: {index.name}: weight_map must name the file of each weight")
    for name in sorted(names):
        if not name.endswith(".safetensors") or not _is_inside(name, index.parent):
            raise ConfigError(
                f"{where}: {index.name}: {in_one_line(name[:80])}: weights must be "
                ".safetensors files inside the folder; copy them there, or convert them with "
                "save_pretrained(..., safe_serialization=True)"
            )
    return sorted(names)


def _is_inside(name: str, folder: Path) -> bool:
    """Whether a file is in a folder, or a link there to the blobs of the hub's cache."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    places = [folder.resolve()]
    if folder.parent.name == "snapshots":
        places.append((folder.parent.parent / "blobs").resolve())
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError):  # circular links
        return False
    return any(map(target.is_relative_to, places))


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of an error, in one line."""
    text = " ".join(str(error).split())
    bare = isinstance(error, ArithmeticError | AttributeError | LookupError | TypeError)
    if bare or not text:  # whose texts say little without the name
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= most else f"{text[: most - 1]}…"
