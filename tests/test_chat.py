"""Chats: published templates say what transformers makes them say, roles are known, and a hostile one does no harm."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import small_config
from test_text import MESSAGES, RENDERED, tokenizer

import glmlens
from glmlens import plot
from glmlens.model import GLM
from glmlens.text import chat
from glmlens.text.prompt_kinds import check_messages
from glmlens.text.tokenizer import Tokenizer

ADD = {"name": "add", "description": "加", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": ADD}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "二"}}}
CALLED = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "metadata": "add", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "observation", "content": "3"},
]
THOUGHT = [
    {"role": "user", "content": [{"type": "text", "text": "U"}]},
    {"role": "assistant", "content": "<think>\nT\n</think>\nA", "reasoning_content": "T"},
]
CHATS = [
    (MESSAGES, {}),
    (MESSAGES, {"tools": TOOLS, "enable_thinking": False}),
    ([{"role": "system", "content": "S", "tools": TOOLS}, *CALLED], {"tools": TOOLS}),
    (THOUGHT, {"add_generation_prompt": False}),
    ([*THOUGHT, *MESSAGES[1:]], {"enable_thinking": True}),
]
NAMES = ["glm-4-9b-chat", "GLM-4-0414", "glm-edge-chat", "GLM-4.6", "GLM-4.7"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_template_says_what_transformers_makes_it_say(templates, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages, said in CHATS:
        said = {"add_generation_prompt": True, "tools": None, "documents": None, **said}
        (expected,), _ = render_jinja_template([messages], chat_template=templates[name], **said)
        assert chat.render_in_process(templates[name], {"messages": messages, **said}) == expected
    assert chat.render_chat(templates[name], messages, **said) == expected


KNOWN = {
    "glm-4-9b-chat": RENDERED,
    "GLM-4-0414": RENDERED,
    "glm-edge-chat": "<|system|>\nSYS<|user|>\nU<|assistant|>\nA<|user|>\nU2<|assistant|>\n",
    "GLM-4.6": "[gMASK]<sop><|system|>\nSYS<|user|>\nU<|assistant|>\n<think></think>\nA<|user|>\nU2<|assistant|>",
    "GLM-4.7": "[gMASK]<sop><|system|>SYS<|user|>U<|assistant|></think>A<|user|>U2<|assistant|><think>",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_template_gives_the_known_text(templates, name):
    assert chat.render_in_process(templates[name], {"messages": MESSAGES, "add_generation_prompt": True}) == KNOWN[name]


def test_tools_stand_where_each_family_was_taught_to_find_them(templates):
    def said(name, messages=MESSAGES):
        return chat.render_in_process(
            templates[name], {"messages": messages, "tools": TOOLS, "add_generation_prompt": True}
        )

    assert said("GLM-4-0414").startswith('[gMASK]<sop><|system|>\n# 可用工具\n\n## add\n\n{\n    "name": "add",')
    assert f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>" in said("GLM-4.6")
    call = "add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>二</arg_value>"
    assert f"<tool_call>{call}\n</tool_call>" in said("GLM-4.6", CALLED[:3])
    assert "<|observation|>\n<tool_response>\n3\n</tool_response><|assistant|>" in said("GLM-4.6", CALLED[:3])


def test_what_is_marked_for_training_is_said_like_the_rest():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=template)
    assert chat.render_in_process(template, {"messages": MESSAGES}) == expected


@pytest.fixture(scope="module")
def lens():
    engine = tokenizer()
    engine.add_special_tokens(["<|system|>", "<|observation|>"])
    text = Tokenizer(engine, "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}")
    torch.manual_seed(0)
    return glmlens.Lens(GLM(small_config(vocab_size=engine.get_vocab_size())), text)


def test_every_token_has_the_role_of_its_turn(lens):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "Mary went"},
            {"role": "assistant", "content": "to"}, {"role": "observation", "content": "the"}]  # fmt: skip
    labels, roles = lens.to_labels(chat), lens.roles(chat)
    assert list(zip(labels, roles, strict=True)) == [
        ("[gMASK]", ""), ("<sop>", ""), ("<|system|>", "system"), ("↵", "system"), ("a", "system"),
        ("<|user|>", "user"), ("↵", "user"), ("Mary", "user"), ("·went", "user"),
        ("<|assistant|>", "assistant"), ("↵", "assistant"), ("to", "assistant"),
        ("<|observation|>", "observation"), ("↵", "observation"), ("the", "observation"),
    ]  # fmt: skip
    assert lens.roles(lens.to_tokens(chat)) == lens.roles(lens.render(chat)) == roles
    assert lens.roles([{"role": "user", "content": "Mary<|assistant|>to"}])[-2:] == ["assistant", "assistant"]
    assert lens.roles("Mary") == ["", "", ""]
    with pytest.raises(ValueError, match="for one prompt, not 2"):
        lens.roles(["Mary", "to"])
    plain = glmlens.Lens(lens.model, Tokenizer(tokenizer(prefix=False)))
    with pytest.raises(ValueError, match=r"none of the role tokens <\|system\|>"):
        plain.roles("Mary")


def test_coloured_tokens_say_who_speaks(lens):
    messages = [{"role": "user", "content": "Mary"}, {"role": "assistant", "content": "to"}]
    labels, roles = lens.to_labels(messages), lens.roles(messages)
    html = plot.tokens(range(len(labels)), labels, roles=roles).to_html()
    turns = [part.split("<")[0] for part in html.split('margin-right:.5em">')[1:]]
    assert turns == ["user", "assistant"]
    assert 'title="4 Mary (user): value 4"' in html
    assert "&lt;b&gt;" in plot.tokens([1.0], ["x"], roles=["<b>"]).to_html()
    with pytest.raises(ValueError, match="2 numbers need as many roles, got 1"):
        plot.tokens([1.0, 2.0], ["a", "b"], roles=["user"])


CONTINUED = [
    [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A begins"}],
    [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A begins \n"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}],
]


@pytest.mark.parametrize("name", [*NAMES, "stripping", "ending"])
def test_a_final_message_is_continued_as_in_transformers(templates, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    others = {
        "stripping": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
        "ending": "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}",
    }
    template = (templates | others)[name]
    here = glmlens.Lens(glmlens.load().model, Tokenizer(tokenizer(), template))
    for messages in CONTINUED[: 3 if name == "GLM-4.6" else 2]:
        (expected,), _ = render_jinja_template([messages], chat_template=template, continue_final_message=True)
        assert here.render(messages, continue_final_message=True) == expected
    assert here.render(CONTINUED[0], continue_final_message="content").endswith("A begins")
    assert CONTINUED[0][1] == {"role": "assistant", "content": "A begins"}


def test_what_cannot_be_continued_is_an_error(lens):
    spoken = CONTINUED[0]
    with pytest.raises(ValueError, match="begins a message after the one that continue_final_message goes on"):
        lens.render(spoken, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="the last message has no 'reasoning' with a text to continue"):
        lens.render(spoken, continue_final_message="reasoning")
    with pytest.raises(ValueError, match="does not write the 'thought' of the last message"):
        lens.render([spoken[0], {**spoken[1], "thought": "x"}], continue_final_message="thought")


def test_a_word_that_the_template_does_not_read_is_an_error(templates):
    def render(name, messages=MESSAGES, **words):
        text = Tokenizer(tokenizer(), templates[name])
        return glmlens.Lens(glmlens.load().model, text).render(messages, **words)

    assert render("GLM-4.6", enable_thinking=False) != render("GLM-4.6")
    for words in ({"enable_thinkin": False}, {"add_special_tokens": True}, {"tokenize": True}, {"enable_thinking": 0}):
        name = "GLM-4.6" if "enable_thinking" not in words else "GLM-4-0414"
        with pytest.raises(
            TypeError, match=rf"reads no '{next(iter(words))}'; it reads .*add_generation_prompt.*tools"
        ):
            render(name, **words)
    assert "# Tools" in render("GLM-4.6", tools=TOOLS)
    for name in ("glm-edge-chat", "glm-4-9b-chat"):
        with pytest.raises(TypeError, match=r"reads no 'tools'; .* of a message, pass \{\"role\": \"system\""):
            render(name, tools=TOOLS)
        assert render(name, tools=None) == render(name, tools=[]) == render(name)
    system = {"role": "system", "content": "", "tools": TOOLS}
    assert "## add" in render("glm-4-9b-chat", [system, *MESSAGES[1:]])


def test_what_is_no_tool_and_no_message_is_an_error(lens):
    lens.tokenizer.chat_template, kept = "{{ tools }}{{ messages }}", lens.tokenizer.chat_template
    for tools in ("add", TOOLS[0], [add_tool], ["add"], [{"type": 1}], [{"function": {}}], 3, {"add"}):
        with pytest.raises(TypeError, match=r"tools.* is .*; expected"):
            chat.check_tools(tools)
    with pytest.raises(TypeError, match=r"tools.* is .*; expected"):
        lens.render(MESSAGES, tools=[{"function": {}}])
    for tools in (TOOLS, [ADD], [{"type": "python"}], tuple(TOOLS)):
        assert lens.render(MESSAGES, tools=tools)
    lens.tokenizer.chat_template = kept
    for messages, error in (
        (MESSAGES[0], "one chat message; a chat is a list of them"),
        ("hello", "a chat is a list of messages; got str"),
        ([["a"]], "message 0 of a chat"),
        ([{"from": "human", "value": "U"}], "message 0 of a chat.*role.*content"),
        ([], "a chat without messages"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            check_messages(messages)
    with pytest.raises(TypeError, match="chat messages and the variables of a template are text"):
        lens.render([{"role": "user", "content": "U", "extra": {1, 2}}])
    with pytest.raises(TypeError, match="message 0 of a chat"):
        lens.render([{"from": "human", "value": "U"}])


def add_tool(a: int) -> int:
    return a


HOSTILE = [
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('%s' % messages).__init__ }}",
    "{{ ''.__class__ }}",
    "{% if messages['__class__'] %}{% endif %}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ lipsum(n=99999) }}",
    "{{ ('x' * 99999) | replace('', 'y' * 99999) }}",
    "{{ ('a ' * 999999) | wordwrap(1) | wordwrap(1) | urlize | indent(99999) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
]

TRIED = """
import json, resource, sys, time
from glmlens.text import chat
for template in json.load(sys.stdin):
    begin = time.monotonic()
    try:
        told = f"came to an end: {chat.render_chat(template, [{'role': 'user'}])[:50]}"
    except chat.TemplateError as e:
        told = f"TemplateError: {e}"
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of this process it would count its parent's too
    print(json.dumps([told[:200], time.monotonic() - begin, most * 1024]))
"""


def test_a_hostile_template_ends_in_our_error_soon_and_in_bounded_memory():
    pytest.importorskip("resource")
    job = json.dumps(HOSTILE)
    done = subprocess.run([sys.executable, "-c", TRIED], input=job, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(HOSTILE)
    for template, (error, seconds, most) in zip(HOSTILE, told, strict=True):
        assert error.startswith("TemplateError"), (template[:80], error)
        assert seconds < chat.MAX_RENDER_SECONDS + 5, template[:80]  # and what a child takes to start on a busy machine
        assert most < chat.MAX_CHILD_BYTES, template[:80]


def test_a_second_is_what_a_template_has():
    begin = time.process_time()
    with pytest.raises(chat.TemplateError, match="did not come to an end within 1 s"):
        chat.render_chat("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", MESSAGES)
    assert time.process_time() - begin < 1  # none of it was spent here


def test_stop_ids_come_from_the_generation_config_and_else_from_the_config(tmp_path):
    from conftest import rewrite_json, write_checkpoint

    write_checkpoint(tmp_path, 2)
    rewrite_json(tmp_path / "generation_config.json", eos_token_id=[5, 7])
    rewrite_json(tmp_path / "config.json", eos_token_id=[3])
    assert glmlens.load(tmp_path).stop_ids == (5, 7)
    rewrite_json(tmp_path / "generation_config.json", eos_token_id=None)
    assert glmlens.load(tmp_path).stop_ids == (3,)
    (tmp_path / "generation_config.json").unlink()
    assert glmlens.load(tmp_path).stop_ids == (3,)
