"""Bayes' rule for the sentiment behind a text, by the forward recursion over the automaton.

    alpha_s(node) = P(words read so far, the path is at node | sentiment s)

Its sum over nodes is P(the review begins with these words | s), so the log-odds of the
sentiment is the log ratio of two sums. A `State` holds both alphas, each divided by its
sum; the steps out of it are kept, so that reading a word is one dictionary look-up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from dpo_cli.grammar.automaton import Node

SENTENCE_END = (".", "!", "?")
# (node, alpha_positive / sum, alpha_negative / sum) of every node the path may be at.
Beliefs = tuple[tuple[int, float, float], ...]


@dataclass(slots=True, eq=False)
class State:
    """What is known after some words.

    steps: word -> (next state, change of the log-odds). cuts: beginning of a word ->
    change of the log-odds.
    """

    beliefs: Beliefs
    steps: dict[str, tuple[State, float]] = field(default_factory=dict, repr=False)
    cuts: dict[str, float] = field(default_factory=dict, repr=False)


class Reader:
    """Reads texts against a graph of `compile_grammar` whose plan has `rows` rows."""

    def __init__(self, graph: list[Node], rows: int) -> None:
        self.graph = graph
        self.states: dict[Beliefs, State] = {}
        self.after_sentences = [self._state(((row, 1.0, 1.0),)) for row in range(rows)]

    def log_odds(self, text: str) -> float:
        """log P(positive | text) - log P(negative | text); see `grammar.log_odds`."""
        words = text.split()
        cut = words.pop() if words and not text[-1].isspace() else None
        state, end = self.after_sentences[0], self.after_sentences[-1]
        total = 0.0
        sentences, slipped = 0, False
        for word in words:
            step = None if slipped else (state.steps.get(word) or self.step(state, word))
            if step is None:
                slipped = True
            else:
                state = step[0]
                total += step[1]
            if word.endswith(SENTENCE_END):
                sentences += 1
                if slipped:
                    state, slipped = self.after_sentences[sentences], False
            if state is end:
                return total
        return total if cut is None or slipped else total + self._cut(state, cut)

    def step(self, state: State, word: str) -> tuple[State, float] | None:
        """The state after `word` and the change of the log-odds; None if it cannot follow."""
        positive: dict[int, float] = defaultdict(float)
        negative: dict[int, float] = defaultdict(float)
        for node, alpha_positive, alpha_negative in state.beliefs:
            edges = self.graph[node]
            for i, candidate in enumerate(edges.words):
                if candidate == word:
                    positive[edges.targets[i]] += alpha_positive * edges.positive[i]
                    negative[edges.targets[i]] += alpha_negative * edges.negative[i]
        if not positive:
            return None
        sum_positive, sum_negative = sum(positive.values()), sum(negative.values())
        beliefs = tuple(
            (node, positive[node] / sum_positive, negative[node] / sum_negative)
            for node in sorted(positive)
        )
        change = math.log(sum_positive / sum_negative)
        state.steps[word] = self._state(beliefs), change
        return state.steps[word]

    def _cut(self, state: State, beginning: str) -> float:
        """Change of the log-odds when the next word begins so; 0 if none does."""
        if beginning not in state.cuts:
            positive = negative = 0.0
            for node, alpha_positive, alpha_negative in state.beliefs:
                edges = self.graph[node]
                for i, candidate in enumerate(edges.words):
                    if candidate.startswith(beginning):
                        positive += alpha_positive * edges.positive[i]
                        negative += alpha_negative * edges.negative[i]
            if not positive:
                return 0.0  # not kept: arbitrary text would fill the table
            state.cuts[beginning] = math.log(positive / negative)
        return state.cuts[beginning]

    def _state(self, beliefs: Beliefs) -> State:
        return self.states.setdefault(beliefs, State(beliefs))
