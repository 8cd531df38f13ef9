"""Chat templates are rendered as transformers renders them, and mistakes in them are one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.chat import ChatTemplate
from asyncpipe_coordinator.prompts import chat_prompts
from asyncpipe_coordinator.text import TextCodec
from tests.checkpoints import save_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "naïve café?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}
""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + system + message['content'] | trim + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "controls": """{{ bos_token }}{% set found = namespace(n=0) %}{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {%- set found.n = found.n + 1 %}{{ message | tojson }}{% generation %}{{ found.n }}{% endgeneration %}
{% endfor %}{{ tools is none or tools is not defined }}""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "model_max_length": 100}


def checkpoint(directory: Path, template: object = None, **files: str) -> Path:
    save_tokenizer(directory)
    config = SPECIAL if template is None else SPECIAL | {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / f"{name}.jinja").write_text(text)
    return directory


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    assert ChatTemplate.load(checkpoint(tmp_path, TEMPLATES[name])).render(MESSAGES) == expected


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "old", chat_template="{{ bos_token }}new{{ eos_token }}")
    assert ChatTemplate.load(path).render(MESSAGES) == "<s>new</s>"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert ChatTemplate.load(checkpoint(tmp_path, templates)).render(MESSAGES) == "plain"


def test_a_prompt_becomes_a_message_whose_special_tokens_are_not_doubled(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    (prompt,) = chat_prompts(["to be"], path)
    assert (prompt.text, prompt.shown) == ("to be", "")
    assert prompt.sent[0] == 0 and prompt.sent[-1] == 2, "<s> and </s>, and no </s> before"
    assert TextCodec.load(path).decode(list(map(int, prompt.sent))) == "to be"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template .* it is no chat model; leave --chat out"),
        ("{% if %}", "the chat template fails: Expected an expression"),
        ("{{ raise_exception('no systems') }}", "the chat template fails: no systems"),
        ("{{ messages[9].content.x }}", "the chat template fails: .* has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__' .* is unsafe"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
    ],
)
def test_what_a_template_cannot_do_is_one_clear_line(template: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=message) as found:
        ChatTemplate.load(checkpoint(tmp_path, template)).render(MESSAGES)
    assert "\n" not in str(found.value)
