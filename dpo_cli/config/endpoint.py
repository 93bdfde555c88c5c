"""The endpoint of a judge's language model: OPENAI_BASE_URL and OPENAI_API_KEY.

Environment variables, as configuration keys are written to files, and secrets must not be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dpo_cli.errors import ConfigError

OPENAI = "https://api.openai.com/v1"
SHORTEST_SECRET = 8  # characters; for local servers people use "EMPTY" or "x"


@dataclass(frozen=True)
class Endpoint:
    """base: URL without a trailing slash. key: secret, sent only to this server."""

    base: str
    key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"{self.base}/chat/completions"

    @property
    def host(self) -> str:
        """Host name and port, for messages."""
        return urlsplit(self.base).netloc

    def hide(self, text: str) -> str:
        """`text` with the key redacted: a server may echo its request."""
        if self.key is None or len(self.key) < SHORTEST_SECRET:
            return text
        return text.replace(self.key, "[redacted]")


def endpoint_from_environment() -> Endpoint:
    """The judge's server; OpenAI's own only if OPENAI_API_KEY is set.

    Raises ConfigError, which never shows a value: a URL might contain a password.
    """
    base = os.environ.get("OPENAI_BASE_URL", "").strip()
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    if not base and key is None:
        raise ConfigError(
            "judge=http: needs an endpoint; set the environment variable OPENAI_BASE_URL=<URL of "
            "an OpenAI-compatible server, such as http://localhost:8000/v1>, or OPENAI_API_KEY for "
            "OpenAI's; or use judge=reward_fn"
        )
    if key is not None and not _is_word(key):  # http.client would show it in its error
        raise ConfigError("OPENAI_API_KEY: contains spaces, control or non-ASCII characters")
    base = (base or OPENAI).rstrip("/").removesuffix("/chat/completions")
    if problem := _problem(base):
        raise ConfigError(f"OPENAI_BASE_URL: {problem}")
    return Endpoint(base, key)


def _is_word(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _problem(base: str) -> str | None:
    """Why the URL cannot be used, or None."""
    try:
        parts = urlsplit(base)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is not a number, a host name with an empty label
        valid = False
    if not (valid and _is_word(base)):
        return "is not a URL; set one such as http://localhost:8000/v1"
    if "@" in parts.netloc:
        return "contains a user name; set the key in OPENAI_API_KEY"
    if parts.query or parts.fragment:
        return "has a query or fragment (? or #), which is not supported; remove it"
    return None
