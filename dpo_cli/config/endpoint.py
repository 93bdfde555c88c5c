"""Where a judge's language model is: OPENAI_BASE_URL and OPENAI_API_KEY of the environment.

Not keys of the configuration: that is written to files, and a key may not be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dpo_cli.errors import ConfigError

OPENAI = "https://api.openai.com/v1"
SHORTEST_SECRET = 8  # characters; local servers are content with "EMPTY" or "x"


@dataclass(frozen=True)
class Endpoint:
    """base: address without a slash at its end. key: for the server alone."""

    base: str
    key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"{self.base}/chat/completions"

    @property
    def host(self) -> str:
        """Name and port, for messages."""
        return urlsplit(self.base).netloc

    def hide(self, text: str) -> str:
        """`text` without the key: a server may repeat what it was sent."""
        if self.key is None or len(self.key) < SHORTEST_SECRET:
            return text
        return text.replace(self.key, "[redacted]")


def endpoint_from_environment() -> Endpoint:
    """The server to ask; OpenAI's own only where there is a key for it.

    Raises ConfigError, which never shows a value: the address might hold a password.
    """
    base = os.environ.get("OPENAI_BASE_URL", "").strip()
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    if not base and key is None:
        raise ConfigError(
            "judge=http: whom to ask? Set the environment variable OPENAI_BASE_URL=<address of an "
            "OpenAI-compatible server, such as http://localhost:8000/v1>, or OPENAI_API_KEY for "
            "OpenAI's; or use judge=reward_fn"
        )
    if key is not None and not _is_word(key):  # http.client would show it in its error
        raise ConfigError("OPENAI_API_KEY: has blanks or characters that no key has")
    base = (base or OPENAI).rstrip("/").removesuffix("/chat/completions")
    if problem := _problem(base):
        raise ConfigError(f"OPENAI_BASE_URL: {problem}")
    return Endpoint(base, key)


def _is_word(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _problem(base: str) -> str | None:
    """Why the address cannot be used."""
    try:
        parts = urlsplit(base)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, a name with an empty part
        named = False
    if not (named and _is_word(base)):
        return "is no address; give one such as http://localhost:8000/v1"
    if "@" in parts.netloc:
        return "holds a user's name; give the key in OPENAI_API_KEY"
    if parts.query or parts.fragment:
        return "has a query (? or #), which is not supported; give the address alone"
    return None
