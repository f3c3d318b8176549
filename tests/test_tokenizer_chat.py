"""Encoding, BOS and chat templates against transformers on real and made-up tokenizer folders."""

import json
import shutil
import time

import pytest
import samples
from transformers import AutoTokenizer

from llmtrt.errors import UserError
from llmtrt.runtime.chat import ChatTemplate
from llmtrt.runtime.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": 'And of <Italy> & "Japan"? 日本'}],
]

# What the families' templates do: Llama 2 (BOS, strip, raise); date, tools, tojson, namespace and loop controls.
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + "
        "'\\n<</SYS>>\\n\\n' %}{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% "
        "set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if "
        "(message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
        "alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system "
        "if loop.first else '') + message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + "
        "message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks": """
{%- set ns = namespace(found=false, count=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
<{{ message.role }}>{{ message.content | trim }}
    {% if message.tool_calls is defined %}
calls={{ message.tool_calls | tojson(indent=2) }}
    {% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}
it said {{ message.content }}
        {% endgeneration %}
    {% endif %}
    {% if ns.count > 5 %}{% break %}{% endif %}
{% endfor %}
{% if tools %}tools={{ tools | tojson }}{% endif %}
{{ messages | tojson }} {{ strftime_now('%Y') }} {{ enable_thinking is defined }} {{ dict(a=1) }}
{% if add_generation_prompt %}<assistant>{% endif %}
""",
}  # fmt: skip


def folder_with(tmp_path, source, template=None, **config):
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    folder = tmp_path / "model"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    if template is not None:
        known["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder


@pytest.mark.parametrize("sample", [samples.smollm2_tokenizer, samples.stories260k])
def test_encode_and_decode_are_those_of_transformers(sample):
    folder = sample()
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = [
        "Hello",
        " two  spaces",
        "😀 日本語",
        "a<|im_start|>b </s> c",
        "x" * 5000,
        samples.data("code-sample.txt").read_text()[:20000],
    ]
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d"])
def test_what_is_no_unicode_is_refused(text):
    with pytest.raises(UserError, match="the text is not valid Unicode at '.ud"):
        Tokenizer(samples.stories260k(), bos_token_id=1).encode(text)


def test_bos_once():
    tokenizer = Tokenizer(samples.stories260k(), bos_token_id=1)
    once = tokenizer.encode("Once")
    assert once[0] == 1 and once.count(1) == 1
    assert tokenizer.encode("<s>Once")[:2] != [1, 1] and tokenizer.encode("<s>Once").count(1) == 1
    assert tokenizer.encode("<s>Once", special=False).count(1) == 1
    assert tokenizer.encode("<s><s>Once").count(1) == 2  # a second one that the caller wrote stays
    assert Tokenizer(samples.smollm2_tokenizer(), bos_token_id=1).encode("Once").count(1) == 0  # this one adds none


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat(messages, prompt):
    folder = samples.smollm2_tokenizer()
    theirs = AutoTokenizer.from_pretrained(folder)
    text = Tokenizer(folder).render_chat(messages, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert Tokenizer(folder, 1).encode(text, special=False) == ids


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_families(tmp_path, name, messages):
    folder = folder_with(tmp_path, samples.stories260k(), TEMPLATES[name])
    ours, theirs = Tokenizer(folder, 1), AutoTokenizer.from_pretrained(folder)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<é>"}}}]
    if name == "blocks":
        messages = [*messages, {"role": "assistant", "content": "…", "tool_calls": calls, "name": None}]
    variables = {"tools": [{"type": "function", "function": {"name": "f"}}], "enable_thinking": False}
    for extra in ({}, variables):
        text = ours.render_chat(messages, **extra)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
        assert ours.encode(text, special=False) == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **extra
        )
    assert str(time.localtime().tm_year) in text or name == "llama2"


def test_where_a_template_may_stand(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ bos_token }}"}]
    folder = folder_with(tmp_path, samples.stories260k(), named, bos_token={"content": "<s>", "special": True})
    assert Tokenizer(folder).render_chat([USER]) == "yes <s>"
    (folder / "chat_template.jinja").write_text("the file wins {{ eos_token }}")
    assert Tokenizer(folder).render_chat([USER]) == "the file wins </s>"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_template_is_refused(tmp_path, attack):
    with pytest.raises(UserError, match="refuses these messages"):
        print(ChatTemplate(attack, {}, tmp_path).render([USER]))


def test_refusals(tmp_path):
    folder = folder_with(tmp_path, samples.stories260k())
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(folder).render_chat([USER])
    template = ChatTemplate(TEMPLATES["llama2"], {"bos_token": "<s>"}, folder)
    with pytest.raises(UserError, match="roles must alternate"):
        template.render([USER, USER])
    for messages in ([], "hello", [{"content": "x"}], ["x"], [{"role": 3, "content": "x"}]):
        with pytest.raises(UserError, match="message"):
            template.render(messages)
    with pytest.raises(UserError, match="strings, numbers"):
        template.render([{"role": "user", "content": object()}])
    with pytest.raises(UserError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {}, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="token ids"):
        Tokenizer(folder)
