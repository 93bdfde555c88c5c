"""A language model as the judge: both orders, a cache on disk, a limit on calls, several threads.

Which matches are judged does not depend on thread timing: calls are reserved match by match, one
block at a time, and retries use the remaining calls.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dpo_cli.config import HttpJudgeConfig
from dpo_cli.config.endpoint import Endpoint
from dpo_cli.durable import cache, encode
from dpo_cli.durable.redact import redact
from dpo_cli.durable.temporary import remove_leftovers
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.evaluation.judge import Decision, Match, Tick, Verdict
from dpo_cli.evaluation.judge_prompts import Letter, parse_choice, plain, question
from dpo_cli.evaluation.judge_request import Client, Misread, Unanswered, backoff

BLOCK = 8  # matches per thread in a block
SILENT = 5  # the run stops after this many initial questions without an answer
RETRIES_OF_UNREADABLE = 1  # of a question whose answer could not be parsed
MAX_REASON = 600  # characters of an answer that are stored

log = logging.getLogger(__name__)

X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(frozen=True)
class Question:
    """The text to send, its cache key, and the letter of the policy's completion."""

    text: str
    key: str
    ours: Letter


@dataclass(frozen=True)
class Answer:
    choice: Letter
    text: str


class Budget:
    """HTTP requests that may still be sent."""

    def __init__(self, calls: int) -> None:
        self._left, self._lock = calls, threading.Lock()

    def take(self, calls: int = 1) -> bool:
        """Reserve that many calls, or none if fewer are left."""
        with self._lock:
            if calls > self._left:
                return False
            self._left -= calls
            return True


class HttpJudge:
    """One per run: `judge.max_calls` limits all its calls together."""

    def __init__(
        self,
        config: HttpJudgeConfig,
        endpoint: Endpoint,
        cache_dir: Path,
        seed: int,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """pause: replaces waiting in tests; by default a wait ends when the run stops."""
        self._config, self._endpoint, self._seed = config, endpoint, seed
        self._client = Client(endpoint, config.timeout_seconds)
        self._folder = cache_dir / "judge"
        remove_leftovers(self._folder)
        self._budget = Budget(config.max_calls)
        self._stop = threading.Event()
        self._pause = self._stop.wait if pause is None else pause
        self._known: dict[str, Answer] = {}
        self._faults: dict[str, str] = {}
        self._heard = False
        self._uncached = False

    @property
    def name(self) -> str:
        return f"http={self._config.model}"

    def __call__(self, matches: Sequence[Match], tick: Tick) -> list[Decision]:
        """Raises ConfigError if the server rejects something that all requests have in common."""
        decisions: list[Decision] = []
        size = BLOCK * self._config.parallel
        for first in range(0, len(matches), size):
            block = [self._questions(match) for match in matches[first : first + size]]
            self._ask_all(self._planned(block))
            decisions += [self._decision(questions) for questions in block]
            tick(len(block))
        return decisions

    def _questions(self, match: Match) -> list[Question]:
        """Questions in one order or both; none for equal texts. A hash decides the first order."""
        ours, theirs = match.ours.completion, match.theirs.completion
        if ours.strip() == theirs.strip():  # as in the question
            return []
        content = json.dumps([self._seed, match.ours.prompt, ours, theirs])
        second = hashlib.sha256(content.encode()).digest()[0] % 2 == 1
        orders = (second, not second) if self._config.both_orders else (second,)
        return [self._question(match, swapped) for swapped in orders]

    def _question(self, match: Match, swapped: bool) -> Question:
        pair = (match.ours.completion, match.theirs.completion)
        a, b = reversed(pair) if swapped else pair
        config = self._config
        text = question(config.task or "dialogue", match.ours.prompt, a, b)
        request = json.dumps([self._endpoint.base, config.model, text, config.max_tokens])
        key = hashlib.sha256(request.encode()).hexdigest()
        return Question(text, key, "B" if swapped else "A")

    def _planned(self, block: Sequence[Sequence[Question]]) -> list[Question]:
        """Distinct questions to ask: those of matches for which enough calls are left."""
        planned: dict[str, Question] = {}
        for questions in block:
            new = {q.key: q for q in questions if q.key not in planned and not self._cached(q.key)}
            if self._budget.take(len(new)):
                planned |= new
        return list(planned.values())

    def _ask_all(self, questions: Sequence[Question]) -> None:
        self._faults = {}
        try:
            for question, answer in in_parallel(self._ask, questions, self._config.parallel):
                if isinstance(answer, Answer):
                    self._keep(question.key, answer)
                else:
                    self._faults[question.key] = answer
                    self._give_up_on_silence(answer)
        except BaseException:
            self._stop.set()  # running threads send no more requests
            raise

    def _ask(self, question: Question) -> Answer | str:
        """The answer, or why there is none. Its first call has been reserved."""
        rng, misread = random.Random(question.key), 0
        for tries in range(1, self._config.retries + 2):
            if self._stop.is_set():
                return "the run was stopped"
            try:
                return self._answer(question)
            except Unanswered as fault:
                misread += isinstance(fault, Misread)
                last = (
                    tries > self._config.retries
                    or not fault.again
                    or misread > RETRIES_OF_UNREADABLE
                )
                if last or not self._budget.take():
                    return f"{fault} ({tries} {'call' if tries == 1 else 'calls'})"
                self._pause(max(fault.wait, backoff(tries, rng.random())))
        raise AssertionError("the last try returns")

    def _answer(self, question: Question) -> Answer:
        text = self._client.ask(self._config.model, question.text, self._config.max_tokens)
        self._heard = True
        choice = parse_choice(text)
        if choice is None:
            raise Misread(f"names neither A nor B, or both: {self._shown(text)}")
        return Answer(choice, self._shown(text))

    def _give_up_on_silence(self, reason: str) -> None:
        if not self._heard and len(self._faults) >= SILENT:
            raise ConfigError(
                f"judge=http: no answer from {self._endpoint.host}: {reason}; check "
                "OPENAI_BASE_URL and whether the server is running"
            )

    def _decision(self, questions: Sequence[Question]) -> Decision:
        """The decision on a match: a tie if both orders disagree, an error if one has no answer."""
        if not questions:
            return Decision(Verdict.TIE, "identical texts")
        answers = [(q, self._known.get(q.key)) for q in questions]
        reason = " / ".join(f"policy as {q.ours}: {a.text}" for q, a in answers if a)
        if any(answer is None for _, answer in answers):
            faults = [self._faults[q.key] for q in questions if q.key in self._faults]
            if faults:
                return Decision(Verdict.ERROR, faults[0])
            reason = f"judge.max_calls={self._config.max_calls} reached"
            return Decision(Verdict.UNASKED, reason)
        votes = {q.ours == a.choice for q, a in answers if a}
        if len(votes) == 2:
            return Decision(Verdict.TIE, reason)
        return Decision(Verdict.WIN if votes.pop() else Verdict.LOSS, reason)

    def _shown(self, text: str) -> str:
        line = " ".join(self._endpoint.hide(plain(text)).split())
        return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}…"

    def _keep(self, key: str, answer: Answer) -> None:
        self._known[key] = answer
        values = {"key": key, "judge": self._config.model, "choice": answer.choice}
        content = encode(json.dumps(redact(values | {"answer": answer.text}), indent=1) + "\n")
        try:
            cache.subfolder(self._folder.parent, self._folder.name)
            cache.keep(self._folder / f"{key}.json", content)
        except DiskError as error:  # this run has the answer in memory
            if not self._uncached:
                log.warning("the judge's answers are not cached: %s", error)
            self._uncached = True

    def _cached(self, key: str) -> bool:
        """Whether the answer is in memory or on disk, from where it is read."""
        if key not in self._known and (answer := read_answer(self._folder / f"{key}.json", key)):
            self._known[key] = answer
        return key in self._known


def read_answer(path: Path, key: str) -> Answer | None:
    """A cached answer; None if the file is absent, truncated or invalid."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, Mapping) or values.get("key") != key:
        return None
    choice, text = values.get("choice"), values.get("answer")
    if choice not in ("A", "B") or not isinstance(text, str):
        return None
    return Answer("A" if choice == "A" else "B", plain(text))


def in_parallel(work: Callable[[X], Y], items: Sequence[X], threads: int) -> Iterator[tuple[X, Y]]:
    """Yield (item, work(item)) as they finish; raises what `work` raises.

    Daemon threads: a run that is stopped does not wait for a server.
    """
    todo: queue.SimpleQueue[X] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[X, Future[Y]]] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def serve() -> None:
        while not todo.empty():
            try:
                item = todo.get_nowait()
            except queue.Empty:  # another thread took the last item
                return
            result: Future[Y] = Future()
            try:
                result.set_result(work(item))
            except BaseException as error:  # noqa: BLE001  raised where the result is read
                result.set_exception(error)
            done.put((item, result))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    for _ in items:
        item, result = done.get()
        yield item, result.result()
