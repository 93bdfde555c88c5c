"""A client for a chat-completions endpoint, with the standard library only.

The server is not trusted: the total time of a request and the size of its answer are limited, and
redirects are not followed, as they would send the key to another host.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import math
import ssl
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.error import HTTPError

from dpo_cli.config.endpoint import Endpoint
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation.judge_prompts import plain

MAX_BYTES = 2**20  # of an answer
MAX_SHOWN = 200  # characters of a server's message
MAX_WAIT = 60.0  # seconds, also for Retry-After
FIRST_WAIT = 0.5  # seconds before the first retry; doubled for each further one
RETRIABLE = (408, 409, 429)  # and 5xx
QUESTION_ERRORS = (413, 422)  # specific to this question: others may succeed
REMEDIES = {
    400: "see judge.model and judge.max_tokens",
    401: "check OPENAI_API_KEY",
    403: "check OPENAI_API_KEY, and whether it has access to judge.model",
    404: "check OPENAI_BASE_URL (it often ends in /v1) and judge.model",
}


class Unanswered(Exception):
    """No answer. again: whether to retry; wait: seconds requested by the server."""

    def __init__(self, reason: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


class Misread(Unanswered):
    """An answer that cannot be parsed."""


class Client:
    """timeout: seconds until the last byte of an answer; connecting to a host that does not
    respond may take as long for each of its addresses.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint, self._timeout = endpoint, timeout
        self._opener = urllib.request.OpenerDirector()
        for handler in (  # no redirects, no files; the environment's proxies apply
            urllib.request.ProxyHandler(), _Http(), _Https(),
            urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
        ):  # fmt: skip
            self._opener.add_handler(handler)

    def ask(self, model: str, text: str, max_tokens: int) -> str:
        """The answer's text, at temperature 0.

        Raises Unanswered, and ConfigError for what would fail for every question.
        """
        body = {
            "model": model, "messages": [{"role": "user", "content": text}],
            "temperature": 0, "max_tokens": max_tokens,
        }  # fmt: skip
        return self._content(self._post(json.dumps(body).encode()))

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "dpo-run"}
        request = urllib.request.Request(self._endpoint.url, body, headers, method="POST")
        if self._endpoint.key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._endpoint.key}")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                raw: bytes = response.read(MAX_BYTES + 1)
                missing = response.length  # a bounded read does not raise IncompleteRead
        except HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from None
        if len(raw) > MAX_BYTES:
            raise Misread(f"an answer of more than {MAX_BYTES:,} bytes")
        if missing:
            raise Unanswered("connection failed: the answer is incomplete")
        return raw

    def _failure(self, error: Exception) -> Exception:
        """The error of a request without a response."""
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                f"OPENAI_BASE_URL: {self._endpoint.host} is not trusted "
                f"({cause.verify_message}); check the URL, or SSL_CERT_FILE"
            )
        if isinstance(cause, TimeoutError):
            return Unanswered(f"no answer within {self._timeout:g} s (judge.timeout_seconds)")
        return Unanswered(f"connection failed: {self._shown(str(cause)) or type(cause).__name__}")

    def _refusal(self, error: HTTPError) -> Exception:
        """The error of a request with a status other than success."""
        host, status = self._endpoint.host, error.code
        with error:
            message, code = self._error_message(error)
        if 300 <= status < 400:
            target = self._shown(error.headers.get("Location", "nowhere"))
            return ConfigError(
                f"OPENAI_BASE_URL: {host} redirects to {target}; redirects are not followed, as "
                "the key would be sent there; set the final URL"
            )
        line = f"{host} returned {status}{': ' if message else ''}{message}"
        if code == "insufficient_quota":  # a 429 that a retry does not resolve
            return ConfigError(f"judge=http: {line}; the account has no credit left")
        if status in RETRIABLE or status >= 500:
            return Unanswered(line, wait=retry_after(error.headers.get("Retry-After"), time.time()))
        if status in QUESTION_ERRORS:
            return Unanswered(line, again=False)
        return ConfigError(f"judge=http: {line}; {REMEDIES.get(status, 'check OPENAI_BASE_URL')}")

    def _error_message(self, error: HTTPError) -> tuple[str, str | None]:
        """The message in an error's body, or the start of the body; and its code, if any."""
        try:
            raw = error.read(MAX_BYTES)
        except (OSError, http.client.HTTPException):
            return "", None
        text = raw.decode("utf-8", errors="replace")
        try:
            body = json.loads(text)["error"]
            return self._shown(str(body["message"])), body.get("code")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return self._shown(text), None

    def _shown(self, text: str) -> str:
        """The start of a server's text, on one line, without the key."""
        line = " ".join(self._endpoint.hide(plain(text)).split())
        return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"

    def _content(self, raw: bytes) -> str:
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            start = self._shown(raw.decode("utf-8", errors="replace"))
            raise Misread(f"not a chat completion: {start}") from None
        if not isinstance(content, str):
            raise Misread("a chat completion without text")
        return content


def retry_after(value: str | None, now: float) -> float:
    """Seconds to wait by a Retry-After header, in seconds or as a date; at most MAX_WAIT."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), MAX_WAIT)


def backoff(tries: int, draw: float) -> float:
    """Seconds before the next try after `tries`. draw: random in [0, 1), so that requests that
    failed together are not retried together."""
    return min(FIRST_WAIT * 2.0 ** (tries - 1), MAX_WAIT) * (0.5 + 0.5 * draw)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_timed(http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_timed(http.client.HTTPSConnection), req)


def _timed(kind: Callable[..., http.client.HTTPConnection]) -> Any:
    """Connections of `kind` whose answers must arrive within the request's timeout."""

    def connect(host: str, timeout: float, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, timeout=timeout, **options)
        within = partial(_Response, deadline=time.monotonic() + timeout)
        connection.response_class = within  # type: ignore[assignment]
        return connection

    return connect


class _Response(http.client.HTTPResponse):
    """A response whose status, headers and body must arrive before the deadline."""

    def __init__(self, sock: Any, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Reads(sock, deadline))


class _Reads(io.RawIOBase):
    """Reads before a deadline: a socket's own timeout applies to each read, so a server that sends
    single bytes slowly could hold a request forever."""

    def __init__(self, sock: Any, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._stream = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        count: int | None = self._stream.readinto(buffer)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
