"""Chat templates in the style of well-known families, and a tokenizer that knows their tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

import small_tokenizers

CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM_FIRST = "{% if messages[0].role == 'system' %}"

LLAMA2 = (
    SYSTEM_FIRST + "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set talk = messages %}{% endif %}"
    "{% for m in talk %}{% set text = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}<s>[INST] {{ text | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<s>' if loop.first }}<|start|>{{ m.role }}<|stop|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
LLAMA31 = (
    "<s><|start|>system<|stop|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if tools %}Functions:{% for t in tools %}\n{{ t | tojson }}{% endfor %}{% endif %}<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
    "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_OPEN
)
# The last answer always has a think block; a block in its content is taken apart.
QWEN3 = (
    "{% for m in messages %}{% set text = m.content %}{% set why = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}"
    "{% set why = m.reasoning_content %}{% elif '</think>' in text %}"
    "{% set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ why.strip('\n') }}\n</think>\n\n{% endif %}{{ text }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# The generation prompt opens the block that every answer begins with.
QWEN3_THINKING = QWEN3.split("{% if add_generation_prompt %}", maxsplit=1)[0] + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Reasoning is cut out of all answers; the generation prompt opens a block.
DEEPSEEK_R1 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + '</s>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_OPEN

TEMPLATES = {
    "Llama 2": LLAMA2, "Llama 3": LLAMA3, "Llama 3.1": LLAMA31, "Mistral": MISTRAL, "Gemma": GEMMA,
    "Phi": PHI, "Qwen 2": QWEN2, "Qwen 3": QWEN3, "Qwen 3 thinking": QWEN3_THINKING,
    "DeepSeek-R1": DEEPSEEK_R1, "Zephyr": ZEPHYR, "ChatML": CHATML,
}  # fmt: skip
SPECIAL = (
    "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<|turn|>",
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>",
)  # fmt: skip
# The token that ends an answer.
ENDS = {
    "Llama 3": "<|eot|>", "Llama 3.1": "<|eot|>", "Gemma": "<|eot|>", "Phi": "<|end|>",
    "Qwen 2": "<|im_end|>", "Qwen 3": "<|im_end|>", "Qwen 3 thinking": "<|im_end|>",
    "ChatML": "<|im_end|>",
}  # fmt: skip


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte level, `</s>` its EOS, with the special tokens of all families."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizers.byte_level_backend(*SPECIAL),
        eos_token="</s>",
        bos_token="<s>",
    )
    made.add_tokens(["<think>", "</think>"])  # as Qwen 3 has them: tokens, but not special
    made.chat_template = TEMPLATES[family]
    return made
