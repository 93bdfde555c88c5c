"""Hostile chat templates: an end in seconds and one line, and no file of the machine."""

import resource
import signal
import time

import pytest

import small_tokenizers
from dpo_cli.bounded import OverLimit, bounded
from dpo_cli.data import template as templates
from dpo_cli.data.chat import chat_format
from dpo_cli.data.template import Renderer
from dpo_cli.data.tokens import tokenizer_facts
from dpo_cli.errors import ConfigError
from dpo_cli.records import Message
from test_encode import answer, encode, user

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}"
HOSTILE = {
    "nested loops": f"{LOOP}{ENDS}x",
    "loops that write": f"{LOOP}ab{ENDS}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(200) }}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "text times a number": "{{ 'a' * 10**13 }}",
    "doubling": f"{DOUBLED}{{% set n.x = n.x ~ n.x %}}{{% endfor %}}{{{{ n.x }}}}",
    "replacing": f"{DOUBLED}{{% set n.x = n.x.replace('a', n.x) %}}{{% endfor %}}{{{{ n.x }}}}",
    "padding": "{{ 'a'.center(10**13) }}",
    "format": "{{ '%10000000000000d' % 1 }}",
    "a power": "{{ 10 ** 10 ** 9 }}",
    "a power of powers": "{% set n = namespace(x=10) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "rounding": "{{ 5 | round(-1000000000) }}",
    "a long range": "{% for i in range(10**12) %}{% endfor %}x",
    "words": "{{ lipsum(n=10**9) }}",
    "an endless recursion": "{% for m in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long template": "x" * 2**21,
    "much text": "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'a' * 10**8 }}",
}
FILES = {
    "include": "{% include '/etc/passwd' %}",
    "include, if there": "{% include ['/etc/passwd', 'x'] %}",
    "import": "{% import '/etc/passwd' as p %}{{ p }}",
    "from": "{% from '/etc/passwd' import x %}{{ x }}",
    "extends": "{% extends '/etc/passwd' %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "attribute filter": "{{ messages | attr('__class__') }}{{ x.y.z }}",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.0)


@pytest.mark.parametrize("name", [*HOSTILE, *FILES])
def test_a_hostile_template_ends_in_one_line(quick, name):
    tokenizer = small_tokenizers.byte_level({**HOSTILE, **FILES}[name])
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"chat template.*data\.chat_template=") as found:
        chat_format(tokenizer, tokenizer_facts(tokenizer))
    assert "\n" not in str(found.value)
    assert "root:" not in str(found.value)
    assert time.process_time() - began < 6


def test_a_template_that_loops_for_one_row_ends_the_run(quick):
    """Dropping that row would only lead to the next: the template is refused."""
    tokenizer = small_tokenizers.byte_level(
        "{% if messages[0].content == 'slow' %}"
        + LOOP
        + ENDS
        + "{% endif %}"
        + small_tokenizers.CHATML
    )
    assert encode(tokenizer, user("fast"), "b")
    with pytest.raises(ConfigError, match="seconds for one conversation"):
        encode(tokenizer, user("slow"), "b")


@pytest.mark.parametrize("broken", ["{{ 1 // 0 }}", "{{ [].x.y }}", "{{ ([] | first).a }}"])
def test_a_row_that_the_template_trips_over_is_dropped(broken):
    """Whatever kind of error it raises, and in whichever of the renderings."""
    tokenizer = small_tokenizers.byte_level(
        "{% if messages[0].content == 'bad' %}" + broken + "{% endif %}" + small_tokenizers.CHATML
    )
    assert encode(tokenizer, user("bad"), "b") == []
    assert encode(tokenizer, user("good"), "b") != []


def test_ordinary_templates_write_long_conversations():
    """60 turns of 2,000 characters, some with the signs of arithmetic."""
    tokenizer = small_tokenizers.chatml()
    talk: list[Message] = []
    for turn in range(60):
        talk += [*user(f"{turn} * 3 = ? " * 200), answer("yes" * 700)]
    text = Renderer(tokenizer)([*talk, *user("end")])
    assert len(text) > 200_000
    assert text.count("<|im_start|>") == 121


def test_arithmetic_of_ordinary_templates_is_as_before():
    source = (
        "{{ 2 ** 3 }} {{ 7 % 4 }} {{ 7 // 2 }} {{ 6 * 7 }} {{ 'a' * 3 }} {{ '%s-%d' % (1, 4) }}"
    )
    tokenizer = small_tokenizers.byte_level(f"{source} {{{{ 2.567 | round(1) }}}} {{{{ 1 / 4 }}}}")
    assert Renderer(tokenizer)(user("a")) == "8 3 3 42 aaa 1-4 2.6 0.25"


def test_limits_are_taken_back():
    """The next work has all the time and memory again, and other handlers are as they were."""
    before, memory = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    acts = {  # the second cannot be interrupted: its signal comes when it has filled the memory
        "seconds": lambda: [i + 1 for i in iter(int, 1)],
        "more than": lambda: list(iter(int, 1)),
        "memory": lambda: bytes(2**33),  # garbage of the act before may be freed meanwhile
    }
    for limit, act in acts.items():
        with pytest.raises(OverLimit, match=limit), bounded(0.1):
            act()
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert resource.getrlimit(resource.RLIMIT_AS) == memory
    assert len(bytearray(2**31)) == 2**31
