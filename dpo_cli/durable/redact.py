"""Redact secrets in everything that is written to files: by the name of their variable or key, and
by their format.

Redact values before they are dumped: YAML folds long strings, shells and JSON escape quotes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"

# TOKENIZERS_PARALLELISM, AUTHOR and PATH are no secrets, and MY_KEY_FILE is a path, not a key.
_NAME = re.compile(
    r"TOKEN(?!IZER)|KEY(?!BOARD|MAP|RING)|SECRET|(?<!BY)(?<!COM)PASS(?!THROUGH|IVE|ENGER|AGE)|CREDENTIAL"
    r"|AUTH(?!OR(?!I[SZ]ATION))|DSN|WEBHOOK|COOKIE|BEARER|(?:^|_)PATS?(?:_|\d|$)|_PWD(?:_|$)"
    r"|(?:^|_)(?:JWT|SAS)(?:_|$)|CONN(?:ECTION)?_?STR",
    flags=re.IGNORECASE,
)
_SURE_NAME = re.compile(r"PASS|SECRET|_PWD", flags=re.IGNORECASE)
_PLACE_NAME = re.compile(r"(PATH|FILE|DIR|SOCK)$", flags=re.IGNORECASE)
# Of keys and overrides, only those in the style of a variable or without another meaning:
# train.micro_batch_tokens and vars.text_key are no secrets.
_KEY_NAME = re.compile(
    r"[A-Z][A-Z0-9_]*|(?i:.*(?:passw(?:or)?d|passphrase|secret|api_?key|private_?key|credentials?"
    r"|(?:access|auth|api|bearer|hf)_?token|webhook(?:_url)?|dsn))"
)
_OVERRIDE = re.compile(r"[~+]*([\w.@/-]+)=(.+)", flags=re.DOTALL)
# Characters; redacting "true" or "100" in every file would hide more than a secret.
_SHORTEST, _SHORTEST_SURE = 8, 4
_SETTINGS = {"true", "false", "none", "null"}

# (substring, pattern to redact): searching for the substring first is far cheaper.
_SHAPES = [(mark, re.compile(shape)) for mark, shape in (
    ("hf_", r"\bhf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[A-Za-z0-9._-]{20,})"),
    ("sk-", r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{16,}"),
    ("k_live_", r"\b[sr]k_live_[A-Za-z0-9]{16,}"),
    ("gh", r"\bgh[opsru]_[A-Za-z0-9]{20,}"),
    ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{20,}"),
    ("glpat-", r"\bglpat-[A-Za-z0-9_-]{16,}"),
    ("xox", r"\bxox[a-z]-[A-Za-z0-9-]{10,}"),
    ("IA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
    ("npm_", r"\bnpm_[A-Za-z0-9]{36}"),
    ("pypi-", r"\bpypi-[A-Za-z0-9_-]{50,}"),
    ("nvapi-", r"\bnvapi-[A-Za-z0-9_-]{20,}"),
    ("gsk_", r"\bgsk_[A-Za-z0-9]{20,}"),
    ("r8_", r"\br8_[A-Za-z0-9]{30,}"),
    ("eyJ", r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"),
    ("earer ", r"(?<=earer )(?=[A-Za-z._~+/-]*[0-9])[A-Za-z0-9._~+/-]{16,}=*"),
    ("asic ", r"(?<=uthorization: [Bb]asic )[A-Za-z0-9+/]{8,}=*"),
    ("://", r"(?<=://)[^/\s:@\"'<>]*:(?!\d+/)[^\s\"'<>]+(?=@)"),  # user:password@host
    ("://", r"(?<=://)[^/\s:@\"'<>]{16,}(?=@)"),  # token@host
    ("hooks.", r"(?<=hooks\.slack\.com/)[a-z]+/[^\s\"'<>]+"),
    ("/webhooks/", r"(?<=/api/webhooks/)[^\s\"'<>]+"),
    ("PRIVATE KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?"
     r"(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
)]  # fmt: skip
_QUERY = re.compile(
    r"([?&](?:access_?token|token|api_?key|key|sig|signature|password|secret|auth)=)[^&\s\"'#]+",
    flags=re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """`value` with secrets replaced, also in strings inside mappings and lists.

    A secret is the value of an environment variable, key or override with such a name (TOKEN, KEY,
    SECRET, PASS, AUTH, ...), or text in the format of an access token.
    """
    return _redact(value, _environment_secrets(tuple(os.environ.items())))


def unkept(words: Iterable[str]) -> list[str]:
    """The overrides with secrets, which files do not store: a resumed run needs them again."""
    return [word for word in words if redact(word) != word]


def hide(values: Mapping[str, Any]) -> None:
    """Treat the values of keys with secret names as secrets everywhere, also in child processes, by
    setting environment variables."""
    for key, value in values.items():
        if isinstance(value, str) and _is_secret_key(key, value):
            os.environ[f"DPO_RUN_SECRET_{key.upper()}"] = value


@lru_cache(maxsize=4)
def _environment_secrets(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Each secret verbatim, and as quoted by shells, YAML, JSON and URLs; longest first, as one
    may contain another."""
    forms: set[str] = set()
    for name, value in variables:
        if _is_secret(name, value):
            for text in (value, value.strip()):
                quoted = text.replace("\\", "\\\\").replace("'", "\\'")
                forms |= {text, quoted, text.replace("'", "''"), text.replace("'", "'\"'\"'")}
                forms |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
                forms |= {quote(text), quote(text, safe="")}
    return tuple(sorted(forms, key=len, reverse=True))


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable of that name holds a secret."""
    if not _NAME.search(name) or _PLACE_NAME.search(name):
        return False
    shortest = _SHORTEST_SURE if _SURE_NAME.search(name) else _SHORTEST
    return len(value.strip()) >= shortest and value.strip().lower() not in _SETTINGS


def _is_secret_key(key: str, value: str) -> bool:
    if "${" in value:  # a reference, not the secret, and needed to resolve the value again
        return False
    last = key.rpartition(".")[2]
    if last == "env_set":  # a group of variables in one override
        return value.startswith("{")
    return bool(_KEY_NAME.fullmatch(last)) and _is_secret(last, value)


def _redact(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {_redact(key, secrets): _redact_item(str(key), item, secrets)
                for key, item in value.items()}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [_redact(item, secrets) for item in value]
    if isinstance(value, Path):
        return _redact(str(value), secrets)
    return value


def _redact_item(key: str, item: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(item, str) and _is_secret_key(key, item):
        return REDACTED
    return _redact(item, secrets)


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for mark, shape in _SHAPES:
        if mark in text:
            text = shape.sub(REDACTED, text)
    if "=" in text:
        text = _QUERY.sub(rf"\1{REDACTED}", text)
        override = _OVERRIDE.fullmatch(text)
        if override and _is_secret_key(override[1], override[2]):
            text = text[: override.start(2)] + REDACTED
    return text
