"""Chat templates in the manner of well-known models, and folders of tokenizers that carry them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from tests.io import tokenizer_samples as samples

# chat_template of meta-llama/Llama-2-7b-chat-hf's tokenizer_config.json
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>' ~ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
VICUNA = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] -%}
{% else %}{% set system = 'A chat between a curious user and an assistant.' %}{% set rest = messages %}{% endif -%}
{{ bos_token ~ system }}
{%- for m in rest %}
{%- if m.role == 'user' %}{{ ' USER: ' ~ m.content }}
{%- elif m.role == 'assistant' %}{{ ' ASSISTANT: ' ~ m.content ~ eos_token }}
{%- else %}{{ raise_exception('Only user and assistant follow the system message!') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
{%- endif %}
{%- if m['role'] == 'user' %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}
{{- m['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""
ALPACA = """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}
{%- set messages = messages[1:] %}
{%- else %}{{ 'Below is an instruction that describes a task. Write a response.\\n\\n' }}{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}
{%- elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + '\\n\\n' }}{% endif %}
{%- endfor %}
{{ '### Response:\\n' if add_generation_prompt }}"""
OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct ' + 'Assistant:' }}{% endif %}"
)
# What jinja can do beyond these: generation blocks, break and continue, macros, namespaces, tojson, nested loops.
MACHINERY = """{% macro turn(m, last=false) -%}
<|im_start|>{{ m.role | trim }}
{{ caller(m) if caller else m.content }}{% generation %}{% set x = 1 %}<|im_end|>{% endgeneration %}
{% endmacro %}
{% set ns = namespace(count=0, seen=[], system=none) %}
{% for m in messages %}
  {% if m.role == 'skip' %}
    {% continue %}
  {% endif %}
  {# a comment #}
  {% if m.role == 'system' and not ns.system %}
    {% set ns.system = m.content %}
    {{ {'system': m.content, 'html': '<b>&é'} | tojson }}
    {%- continue %}
  {% endif %}
  {% set ns.count = ns.count + 1 %}
  {% if ns.count > 40 %}{% break %}{% endif %}
  {% call(m) turn(m, last=loop.last) %}{{ m.content }}{{ loop.index if false else '' }}{% endcall %}
  {% for n in range(3) if n % 2 == 0 %}{{ n }}{{ loop.length }}{{ ', ' if not loop.last }}{% else %}none{% endfor %}
{% endfor %}
{{ [ns.count, ns.count * 2, 'ab' * 2, -ns.count, 7 // 2, 2 ** 3, not true] | tojson(indent=1) }}
{{ dict(a=1)['a'] }} {{ messages | map(attribute='role') | join('|') }} {{ messages[0].get('name', 'nobody') }}
{% set body %}{% for m in messages[-1:] %}{{ m['role'] | upper }}{% endfor %}{% endset %}{{ body }}
{{ tools is none }} {{ documents is none }} {{ x is defined }} {{ nothing }} {{ unk_token }}
{% filter upper %}{{ 'a' ~ 1 ~ none }}{% endfilter %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[PAD]")


def write_folder(
    folder: Path, template: Any, *, kind: str = "prepend", plain: tuple[str, ...] = (), **settings: Any
) -> Path:
    """A tokenizer folder that fastllama and transformers read: Llama 2's kind ("prepend", "metaspace") or byte-level.

    Added to the vocabulary are the special tokens CONTROLS, and `plain` ones that are not special.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        spec = json.loads(_byte_level())
    else:
        spec = json.loads(samples.write_json(samples.model_bytes("tiny"), folder, kind).read_text())
        first = max(spec["model"]["vocab"].values()) + 1
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spec["added_tokens"] += [{"id": first + n, "content": text, **flags} for n, text in enumerate(CONTROLS)]
    first = 1 + max(*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"]))
    flags = spec["added_tokens"][-1] | {"special": False}
    spec["added_tokens"] += [flags | {"id": first + n, "content": text} for n, text in enumerate(plain)]
    spec["truncation"] = None
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config = named | {"chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@functools.cache
def _byte_level() -> str:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<unk>", *CONTROLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["once upon a time there was a small fox who lived in the forest"] * 5, trainer)
    text: str = backend.to_str()
    return text


@functools.cache
def tokenizer(template: str, kind: str = "prepend", **settings: Any) -> Tokenizer:
    """fastllama's tokenizer of such a folder."""
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_folder(Path(folder), template, kind=kind, **settings))


@functools.cache
def hugging_face(template: str, kind: str = "prepend", **settings: Any) -> Any:
    """transformers' tokenizer of such a folder, as a function from messages to token ids."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoTokenizer.from_pretrained(write_folder(Path(folder), template, kind=kind, **settings))
    return functools.partial(theirs.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=False)
