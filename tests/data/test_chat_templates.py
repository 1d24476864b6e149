"""What the assistant wrote, for the kinds of chat templates that there are, each written here; spans by hand.

In expected texts an answer stands between « and ».
"""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenised import tokenised
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from gaudi_lm.data.chat_templates import ChatTemplate
from gaudi_lm.data.completions import encode_with_offsets
from gaudi_lm.data.conversations import ConversationError, read_messages, read_tools
from gaudi_lm.errors import UserError

EOS = "<|endoftext|>"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>", "<|channel|>"]

# An end of turn that is not the EOS.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The whole conversation has an end of its own.
END_OF_ALL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Only the last answer has an end at all.
END_OF_LAST = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if loop.last and m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The last answer ends otherwise than the others, and begins with what the model is to write itself.
OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}"
    "{% endif %}{{ '|' + m.content }}{% if loop.last and m.role == 'assistant' %}{{ '<|return|>' }}{% else %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# Reasoning is dropped from all answers but the last, where it is written, also if there is none.
REASONING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_PROMPT = REASONING.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Marks of the template's own; the end is outside of them.
MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No system message, user and assistant in turn, contents stripped, nothing that begins an answer.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Contents in parts only.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{{ part['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Calls of tools, and their results.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '\n<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Before one that takes null where a message has no text, and no empty one.
FULL = "{% for m in messages if m.content == '' %}{{ raise_exception('empty') }}{% endfor %}"
# Something is decided by how an answer begins, so that it cannot be marked.
PECULIAR = CHATML.replace("+ m.content +", "+ ('!' if m.content[:1] == 'a' else '?') + m.content +")


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


ONE = [user("hi"), assistant("hello")]
TWO = [user("hi"), assistant("hello"), user("hi"), assistant("hello")]
THOUGHT = [
    user("hi"),
    assistant("<think>\nx\n</think>\n\nhello"),
    user("yo"),
    assistant("<think>\ny\n</think>\n\nbye"),
]
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rom"}}}
TOOL_MESSAGES = [
    user("hi"),
    assistant(None, tool_calls=[CALL]),
    {"role": "tool", "content": "17"},
    assistant("17 now"),
]


@pytest.fixture(scope="module")
def tokenizer(assets) -> PreTrainedTokenizerFast:
    found = AutoTokenizer.from_pretrained(assets.tokenizer)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


def marked(tokenizer, template: str, messages: list[dict], tools=None, first: int = 0, stop_ids=None) -> str:
    tokenizer.chat_template = template
    text, spans, _ = ChatTemplate(tokenizer, stop_ids).answers(read_messages(messages), tools, first)
    for start, end in reversed(spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}\n" for role, content in turns)


CASES = {
    "one": (CHATML, ONE, chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"))),
    "two": (CHATML, TWO, 2 * chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"))),
    "system, and a question last": (
        CHATML,
        [{"role": "system", "content": "be kind"}, *ONE, user("hello")],
        chatml(
            ("system", "be kind<|im_end|>"), ("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"),
            ("user", "hello<|im_end|>"),
        ),
    ),
    "the answer is in the question": (
        CHATML,
        [user("hello\n<|im_end|> hello"), assistant("hello")],
        chatml(("user", "hello\n<|im_end|> hello<|im_end|>"), ("assistant", "«hello<|im_end|>»")),
    ),
    "empty": (
        CHATML,
        [user(""), assistant(""), user(""), assistant(" ")],
        chatml(
            ("user", "<|im_end|>"), ("assistant", "«<|im_end|>»"), ("user", "<|im_end|>"),
            ("assistant", "« <|im_end|>»"),
        ),
    ),
    "white space": (
        CHATML,
        [user(" hi "), assistant(" hello \n"), user("\n"), assistant("\nbye")],
        chatml(
            ("user", " hi <|im_end|>"), ("assistant", "« hello \n<|im_end|>»"), ("user", "\n<|im_end|>"),
            ("assistant", "«\nbye<|im_end|>»"),
        ),
    ),
    "two ends": (
        CHATML.replace("<|im_end|>", "<|end|><|im_end|>"),
        TWO,
        2 * chatml(("user", "hi<|end|><|im_end|>"), ("assistant", "«hello<|end|><|im_end|>»")),
    ),
    "no end but a head": (
        END_OF_LAST.replace("<|' + m.role + '|>", "<|im_start|>' + m.role + ' ").replace(
            "<|assistant|>", "<|im_start|>assistant "
        ),
        TWO,
        "<|im_start|>user hi<|im_start|>assistant «hello»"
        f"<|im_start|>user hi<|im_start|>assistant «hello{EOS}»",
    ),
    "an empty one is written otherwise": (
        CHATML.replace("m.content", "(m.content or '-')"),
        [user("hi"), assistant(""), user("hi"), assistant("hello")],
        chatml(
            ("user", "hi<|im_end|>"), ("assistant", "«-<|im_end|>»"), ("user", "hi<|im_end|>"),
            ("assistant", "«hello<|im_end|>»"),
        ),
    ),
    "no more than one answer": (
        "{% if messages | length > 3 %}{{ raise_exception('one answer') }}{% endif %}" + CHATML,
        TWO[:3],
        chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"), ("user", "hi<|im_end|>")),
    ),
    "no question alone": (
        "{% if messages | length < 2 %}{{ raise_exception('no answer') }}{% endif %}" + CHATML,
        ONE,
        chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»")),
    ),
    "an end of all": (
        END_OF_ALL,
        TWO,
        2 * "<|user|>\nhi<|end|>\n<|assistant|>\n«hello<|end|>»\n" + EOS,
    ),
    "an end of all, question last": (
        END_OF_ALL,
        TWO[:3],
        "<|user|>\nhi<|end|>\n<|assistant|>\n«hello<|end|>»\n<|user|>\nhi<|end|>\n" + EOS,
    ),
    "an end of the last": (END_OF_LAST, TWO, f"<|user|>hi<|assistant|>«hello»<|user|>hi<|assistant|>«hello{EOS}»"),
    "another end": (
        OTHER_END,
        TWO,
        "<|im_start|>user|hi<|end|><|im_start|>assistant«<|channel|>final|hello<|end|>»"
        "<|im_start|>user|hi<|end|><|im_start|>assistant«<|channel|>final|hello<|return|>»",
    ),
    "reasoning": (
        REASONING,
        THOUGHT,
        chatml(
            ("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"), ("user", "yo<|im_end|>"),
            ("assistant", "«<think>\ny\n</think>\n\nbye<|im_end|>»"),
        ),
    ),
    "reasoning that is not there": (
        REASONING,
        TWO,
        chatml(
            ("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"), ("user", "hi<|im_end|>"),
            ("assistant", "«<think>\n\n</think>\n\nhello<|im_end|>»"),
        ),
    ),
    "reasoning that the prompt begins": (
        THINKING_PROMPT,
        THOUGHT,
        chatml(
            ("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"), ("user", "yo<|im_end|>"),
            ("assistant", "<think>\n«y\n</think>\n\nbye<|im_end|>»"),
        ),
    ),
    "marks": (MARKS, TWO, 2 * chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"))),
    "marks with the end": (
        MARKS.replace("{{ m.content }}{% endg", "{{ m.content + '<|im_end|>' }}{% endg").replace(
            "{{ '<|im_end|>\n' }}{% endfor", "{{ '\n' }}{% endfor"
        ),
        TWO,
        2 * chatml(("user", "hi"), ("assistant", "«hello<|im_end|>»")),
    ),
    "nothing before an answer": (STRICT, TWO, f"[INST] hi [/INST]« hello {EOS}»[INST] hi [/INST]« hello {EOS}»"),
    "stripped": (
        STRICT, [user(" hello "), assistant("\n hello\n")], f"[INST] hello [/INST]« hello {EOS}»",
    ),
    "parts": (PARTS, TWO, 2 * chatml(("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»"))),
    "a system message is wanted": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML,
        [{"role": "system", "content": "x"}, *ONE],
        chatml(("system", "x<|im_end|>"), ("user", "hi<|im_end|>"), ("assistant", "«hello<|im_end|>»")),
    ),
    "private characters": (
        CHATML,
        [user("\U000f0001 a"), assistant("\U000f0001 \U0010fffd")],
        chatml(("user", "\U000f0001 a<|im_end|>"), ("assistant", "«\U000f0001 \U0010fffd<|im_end|>»")),
    ),
    "tools": (
        TOOLS,
        TOOL_MESSAGES,
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<call>get{"city": "Rom"}</call><|im_end|>»\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n«17 now<|im_end|>»\n",
    ),
    "tools, and never an empty text": (
        FULL + TOOLS,
        TOOL_MESSAGES,
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<call>get{"city": "Rom"}</call><|im_end|>»\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n«17 now<|im_end|>»\n",
    ),
    "tools, some with a text": (
        FULL + TOOLS,
        [*TOOL_MESSAGES, user("hi"), assistant("I look", tool_calls=[CALL])],
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<call>get{"city": "Rom"}</call><|im_end|>»\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n«17 now<|im_end|>»\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n«I look\n<call>get{"city": "Rom"}</call><|im_end|>»\n',
    ),
    "tools, arguments as text": (
        TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments"),
        TOOL_MESSAGES,
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<call>get{"city": "Rom"}</call><|im_end|>»\n'
        "<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n«17 now<|im_end|>»\n",
    ),
    "peculiar": (
        PECULIAR,
        [user("ab"), assistant("ab"), user("x"), assistant("cd")],
        chatml(
            ("user", "!ab<|im_end|>"), ("assistant", "«!ab<|im_end|>»"), ("user", "?x<|im_end|>"),
            ("assistant", "«?cd<|im_end|>»"),
        ),
    ),
    "peculiar, and nothing around it": (
        "{% for m in messages %}{{ ('!' if m.content[:1] == 'a' else '?') + m.content + '\n' }}{% endfor %}",
        [user("x"), assistant("ab"), user("y"), assistant("cd")],
        "?x\n!«ab»\n?y\n?«cd»\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_answers(tokenizer, case):
    template, messages, expected = CASES[case]
    assert marked(tokenizer, template, messages) == expected


def test_a_header_that_ends_turns(tokenizer):
    """Where only the next turn's head ends an answer, it counts if the model is known to stop there."""
    begin = "<|user|>hi<|assistant|>«hello"
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    last = f"hi<|assistant|>«hello{EOS}»"
    assert marked(tokenizer, END_OF_LAST, TWO) == f"{begin}»<|user|>{last}"
    assert marked(tokenizer, END_OF_LAST, TWO, stop_ids=[stop]) == f"{begin}<|user|>»{last}"


def test_answers_of_a_prompt_do_not_count(tokenizer):
    for template in (CHATML, MARKS):
        text = marked(tokenizer, template, TWO, first=2)
        assert text == chatml(
            ("user", "hi<|im_end|>"), ("assistant", "hello<|im_end|>"), ("user", "hi<|im_end|>"),
            ("assistant", "«hello<|im_end|>»"),
        )  # fmt: skip


def test_a_template_that_always_writes_the_next_head(tokenizer):
    """As the first one of Llama 3: what begins a turn ends none."""
    always = CHATML.replace("{% if add_generation_prompt %}", "").replace("\n' }}{% endif %}", "\n' }}")
    assert always != CHATML
    heads = always.replace("<|im_start|>' + m.role + '\n", "<|head|>' + m.role + '<|ends|>")
    heads = heads.replace("<|im_start|>assistant\n", "<|head|>assistant<|ends|>").replace("<|im_end|>\n", "<|im_end|>")
    for template, head in ((always, "<|im_start|>assistant\n"), (heads, "<|head|>assistant<|ends|>")):
        tokenizer.chat_template = template
        assert ChatTemplate(tokenizer).end == "<|im_end|>"
        text = marked(tokenizer, template, TWO)
        assert text.count("«hello<|im_end|>»") == 2 and text.endswith(head)
    rows = rows_of(tokenizer, [{"messages": [user("hi"), assistant("hello " * 99)]}], max_length=80)
    assert tokenizer.decode(rows[0]["input_ids"][-1:]) == "<|im_end|>"


def test_reasoning_before_a_call_without_text(tokenizer):
    """Qwen 3 writes a line break between what is said and a call, where anything is said."""
    said = (
        "{% set said = (m.content or '').split('</think>')[-1].lstrip('\n') %}{{ '\n' }}{% if m.content != said %}"
        "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}"
        "{% endif %}{{ said }}"
    )
    template = TOOLS.replace("{% if m.content %}{{ '\n' + m.content }}{% endif %}", said)
    template = template.replace("'\n<call>'", "('\n' if said else '') + '<call>'")
    assert "set said" in template and "if said" in template
    call = [user("hi"), assistant("<think>\nneed\n</think>\n\n", tool_calls=[CALL]), *TOOL_MESSAGES[2:]]
    assert "«<think>\nneed\n</think>\n\n<call>" in marked(tokenizer, template, call)


def test_answers_of_weight_0_do_not_count(tokenizer):
    """OpenAI's format leaves messages out of training by `weight`; also those that the template itself marks."""
    for weights in ((0, 1), (1, 0)):
        first, last = ("«hello<|im_end|>»" if weight else "hello<|im_end|>" for weight in weights)
        messages = [*TWO[:1], {**TWO[1], "weight": weights[0]}, *TWO[2:3], {**TWO[3], "weight": weights[1]}]
        for template in (CHATML, MARKS):
            text = marked(tokenizer, template, messages)
            answered = chatml(("user", "hi<|im_end|>"), ("assistant", first), ("user", "hi<|im_end|>"))
            assert text == answered + chatml(("assistant", last))
    rows = rows_of(tokenizer, [{"messages": [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]}])
    assert rows[0]["labels"].tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_tools_reach_the_template(tokenizer):
    tool = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
    text = marked(tokenizer, TOOLS, TOOL_MESSAGES, tools=[tool])
    assert text.startswith(f"<|im_start|>tools\n{json.dumps([tool])}<|im_end|>\n<|im_start|>user\nhi")


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (STRICT, [{"role": "system", "content": "x"}, *ONE], "cannot render it (System role not supported)"),
        (STRICT, [user("a"), user("b"), assistant("c")], "cannot render it (roles must alternate)"),
        (CHATML, TOOL_MESSAGES, "does not write the tool calls of message 2"),
        (CHATML, [user("hi"), assistant("I look", tool_calls=[CALL])], "does not write the tool calls of message 2"),
        (
            TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            [user("hi"), assistant(None, tool_calls=[CALL, CALL])],
            "does not write the tool calls of message 2",
        ),
        (
            PECULIAR.replace("m.content +", "m.content | upper +"),
            [user("x"), assistant("ab")],
            "changes what message 2 says",
        ),
        (PECULIAR, [user("x"), assistant("ab", tool_calls=[CALL])], "changes what message 2 says"),
        (CHATML.replace("m.content", "m.content + m.missing.more"), ONE, "cannot render it"),
    ],
)
def test_refused(tokenizer, template, messages, words):
    with pytest.raises(ConversationError) as caught:
        marked(tokenizer, template, messages)
    assert words in str(caught.value)


def test_a_template_that_is_no_jinja(tokenizer):
    with pytest.raises(UserError, match="the tokenizer's chat template is not valid Jinja: line 1"):
        marked(tokenizer, "{% for m in messages %}", ONE)


def learnt(row: dict) -> np.ndarray:
    """The tokens of a row that are labels; each label is the token at its place."""
    is_label = row["labels"] != -100
    assert (row["labels"] == row["input_ids"])[is_label].all()
    return row["input_ids"][is_label]


def rows_of(tokenizer, examples: list[dict], max_length: int = 300, concatenate: bool = False, inputs: bool = False):
    rows = tokenised(tokenizer, examples, max_length, train_on_inputs=inputs, concatenate=concatenate)
    return rows.with_format("numpy")


@pytest.mark.parametrize("template", [CHATML, END_OF_ALL, END_OF_LAST, OTHER_END, REASONING, MARKS, STRICT])
def test_rows_are_the_rendering(tokenizer, template):
    """The tokens are those of the whole conversation up to the last answer's end, and one end is enough."""
    tokenizer.chat_template = template
    messages = [user("What is 1+1?"), assistant("It is 2."), user("And 2+2? It is 2."), assistant("4.\n\nIt is.")]
    whole = tokenizer.apply_chat_template(messages)
    text = marked(tokenizer, template, messages)
    answers = [part.split("»")[0] for part in text.split("«")[1:]]
    for inputs in (False, True):
        row = rows_of(tokenizer, [{"messages": messages}], inputs=inputs)[0]
        tokens = row["input_ids"]
        assert tokens.tolist() == whole[: len(tokens)]
        assert tokenizer.decode(tokens) == text[: text.rindex("»")].replace("«", "").replace("»", "")
        assert tokenizer.decode(learnt(row)) == (tokenizer.decode(tokens) if inputs else "".join(answers))


def test_an_end_is_added_where_there_is_none(tokenizer):
    template = CHATML.replace("<|im_end|>", "")
    assert marked(tokenizer, template, ONE) == chatml(("user", "hi"), ("assistant", "«hello»"))
    row = rows_of(tokenizer, [{"messages": ONE}])[0]
    assert tokenizer.decode(learnt(row)) == "hello" + EOS


def test_cut_and_concatenated(tokenizer):
    """A cut answer ends as the template ends it; blocks are the rows one after the other."""
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [user("hi"), assistant("a long answer that does not fit")]
    whole = rows_of(tokenizer, [{"messages": messages}])[0]
    size = len(whole["input_ids"])
    cut = rows_of(tokenizer, [{"messages": messages}], size - 3)[0]
    for name in ("input_ids", "labels"):
        assert cut[name].tolist() == [*whole[name][: size - 4], end]
    rows = [rows_of(tokenizer, [{"messages": m}])[0] for m in (TWO, messages, ONE)]
    blocks = rows_of(tokenizer, [{"messages": m} for m in (TWO, messages, ONE)], 8, concatenate=True)
    for name in ("input_ids", "labels"):
        joined = np.concatenate([row[name] for row in rows])
        assert np.concatenate(blocks[name]).tolist() == joined[: len(joined) // 8 * 8].tolist()


def test_a_token_across_the_border_is_learnt(tokenizer):
    text = "of the statement"
    tokens = [text[start:end] for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    assert any(len(token) > 2 for token in tokens), tokens
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            (_, [(first, stop)]), *_ = encode_with_offsets(tokenizer, [text], [[(start, end)]])
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            reached, expected = 0, []
            for number, (_, last) in enumerate(places):
                if reached < end and last > start:
                    expected.append(number)
                reached = last
            assert list(range(first, stop)) == expected, (start, end)


def test_a_slow_tokenizer(tokenizer, tmp_path):
    """Without places of characters: the same rows."""
    tokenizer.save_pretrained(tmp_path)
    slow = GPT2Tokenizer.from_pretrained(tmp_path)
    assert not slow.is_fast
    examples = [{"messages": THOUGHT}, {"messages": TWO}, {"messages": [user("a"), assistant("of the\n\nstatement")]}]
    for template in (CHATML, STRICT, REASONING, END_OF_LAST):
        tokenizer.chat_template = slow.chat_template = template
        rows = [rows_of(one, examples).with_format(None) for one in (tokenizer, slow)]
        assert rows[0][:] == rows[1][:] and len(rows[0]) == 3


def test_rows_that_cannot_be_read_are_named(tokenizer, caplog):
    tokenizer.chat_template = STRICT
    good, system = {"messages": ONE}, {"messages": [{"role": "system", "content": "x"}, *ONE]}
    examples = [good, system, {"messages": None}, good, {"messages": [user("a")]}]
    with caplog.at_level("INFO", logger="gaudi_lm"):
        assert len(rows_of(tokenizer, examples)) == 2
    assert (
        "train: 3 of 5 examples left out: row 2: the chat template cannot render it (System role not supported); "
        "row 3: there is no conversation; row 5: it has no message of the assistant, or none of weight 1"
    ) in caplog.text
    assert "train: 2 examples" in caplog.text
    with caplog.at_level("INFO", logger="gaudi_lm"):
        rows_of(tokenizer, [good, *[system] * 9])
    assert caplog.messages[-2].endswith("row 6: the chat template cannot render it (System role not supported); ...")
    with pytest.raises(UserError, match="none of the 2 train examples can be read: row 1: the chat template cannot"):
        rows_of(tokenizer, [system, system])


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "value",
    [
        [USER, ASSISTANT],
        json.dumps([USER, ASSISTANT]),
        {"messages": [USER, ASSISTANT]},
        {"id": 5, "messages": [USER, ASSISTANT]},
        json.dumps({"messages": [USER, ASSISTANT]}),
        {"role": ["user", "assistant"], "content": ["a", "b"]},
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"role": "User", "content": "a", "name": None}, {"role": "model", "text": "b"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": ["b"]}],
        [{"role": "user", "content": {"type": "text", "text": "a"}}, ASSISTANT],
        ["a", "b"],
    ],
)
def test_conversations_as_people_store_them(value):
    assert read_messages(value) == [USER, ASSISTANT]


@pytest.mark.parametrize("value", [[USER], USER, ["a"], "a", {"content": "a"}, json.dumps([USER])])
def test_prompts_as_people_store_them(value):
    assert read_messages(value, "user") == [USER]


def test_parts_of_other_kinds():
    thought = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "assistant", "content": thought}])[0]["reasoning_content"] == "t"
    for value, words in [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 has a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "message 1 has a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part of type 'text'"),
        ([USER, {"content": "b"}], "message 2 has no role"),
        ([USER, {"role": "assistant", "content": None}], "message 2 has no content"),
        ([USER, 5], "message 2 is a int"),
        ([USER, "b"], "message 2 is a str, not an object"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "message 2 has weight 0.5, not 0 or 1"),
        ([USER, {**ASSISTANT, "tool_calls": "get"}], "the tool_calls of message 2 are no list of objects"),
        ([USER, {**ASSISTANT, "tool_calls": ["get"]}], "the tool_calls of message 2 are no list of objects"),
        ("no JSON", "no list of messages"),
        ("17", "a str that is no list of messages"),
        ([], "there is no conversation"),
        (None, "there is no conversation"),
    ]:
        with pytest.raises(ConversationError, match=words):
            read_messages(value)
    for tools in ({"name": "get"}, ["get"]):
        with pytest.raises(ConversationError, match="the tools are no list of JSON schemas"):
            read_tools(tools)


@pytest.mark.parametrize("content", [{"temperature": 17, "unit": "°C"}, [{"temperature": 17}, {"wind": 3}], [3, 4]])
def test_results_of_tools_may_be_objects(content):
    (message,) = read_messages([{"role": "tool", "content": content}])
    assert json.loads(message["content"]) == content
    parts = [{"type": "text", "text": json.dumps(content, ensure_ascii=False)}]
    assert read_messages([{"role": "tool", "content": parts}]) == [message], "the parts of a text are no object"
    assert read_messages([{"role": "tool", "content": [message["content"]]}]) == [message]


@pytest.mark.parametrize("content", ["", None])
def test_calls_of_functions_in_the_older_format(tokenizer, content):
    call = {"name": "get", "arguments": '{"city": "Rom"}'}
    older = [user("hi"), assistant(content, function_call=call), {"role": "function", "name": "get", "content": "17"}]
    assert marked(tokenizer, TOOLS, [*older, TOOL_MESSAGES[3]]) == marked(tokenizer, TOOLS, TOOL_MESSAGES)
    function = {"name": "get", "parameters": {"city": "string"}}
    tool = {"type": "function", "function": function}
    for schemas in ([function], [tool]):  # the column may hold what is in tools now
        rows = [{"messages": older, "functions": schemas}, {"messages": older, "functions": None}]
        newer = [{"messages": older, "tools": [tool]}, {"messages": older}]
        assert [row["input_ids"].tolist() for row in rows_of(tokenizer, rows)] == [
            row["input_ids"].tolist() for row in rows_of(tokenizer, newer)
        ]
    (row,) = rows_of(tokenizer, [{"messages": older, "functions": ["get"]}])  # names alone are no schemas
    assert "tools" not in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("as_text", [True, False])
def test_what_is_null_in_json_stays(tokenizer, as_text):
    """In calls and tools as the template writes them; only keys that Arrow has made are left out."""
    tokenizer.chat_template = TOOLS
    call = {"id": None, "function": {"name": "get", "arguments": {"city": "Rom", "unit": None}}}
    tool = {"type": "function", "function": {"name": "get", "parameters": {"unit": {"default": None}}}}
    messages = [user("hi"), {**assistant(None, tool_calls=[call]), "name": None}]
    rows = [{"messages": messages, "tools": [tool]}, {"messages": TOOL_MESSAGES, "tools": [{"type": "other"}]}]
    if as_text:
        rows = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    first, second = rows_of(tokenizer, rows)
    null = as_text and ', "unit": null' or ""
    assert tokenizer.decode(learnt(first)) == f'<call>get{{"city": "Rom"{null}}}</call><|im_end|>'
    default = '{"default": null}' if as_text else "{}"
    assert f'"parameters": {{"unit": {default}}}' in tokenizer.decode(first["input_ids"])
    assert "null" not in tokenizer.decode(second["input_ids"])


def test_prompts_and_completions_that_are_messages(tokenizer):
    """Only the completion is learnt, also where the prompt shows earlier answers."""
    tokenizer.chat_template = CHATML
    expected = rows_of(tokenizer, [{"messages": TWO}])[0]
    row = rows_of(tokenizer, [{"prompt": TWO[:3], "completion": TWO[3:]}])[0]
    assert row["input_ids"].tolist() == expected["input_ids"].tolist()
    assert tokenizer.decode(learnt(row)) == "hello<|im_end|>"
    system = rows_of(tokenizer, [{"system": "be kind", "conversations": json.dumps(TWO)}])[0]["input_ids"]
    assert tokenizer.decode(system).startswith("<|im_start|>system\nbe kind<|im_end|>\n")


def with_marks(template: str, begin: str, end: str) -> str:
    """A template with marks of its own around what is between `begin` and `end`, where the assistant speaks."""
    before, rest = template.split(begin)
    inner, after = rest.split(end)
    body = f"{inner}{end}"
    return (
        f"{before}{begin}{{% if m.role == 'assistant' %}}{{% generation %}}{body}{{% endgeneration %}}"
        f"{{% else %}}{body}{{% endif %}}{after}"
    )


FRAGMENTS = [
    "hello", "hi", " ", "\n", "<think>", "\n</think>\n\n", "<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "é日",
]  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, REASONING])
@settings(max_examples=150)
@example(said=["", "<think>\n</think>\n\n"])
@example(said=["", " \n</think>\n\nhi"])
@example(said=["<|im_start|>assistant\n", " \n</think>\n\n"])
@given(said=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join), min_size=2, max_size=6))
def test_places_are_those_of_marks(tokenizer, template, said):
    """Whatever is said: found without marks as with the marks that the same template could have had."""
    split = "{{ '<|im_start|>' + m.role + '\n' }}"
    plain = template.replace("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", split + (
        "{{ m.content + '<|im_end|>' }}{{ '\n' }}"
    )).replace("{{ said + '<|im_end|>\n' }}", "{{ said + '<|im_end|>' }}{{ '\n' }}")  # fmt: skip
    messages = [(user, assistant)[number % 2](text) for number, text in enumerate(said)]
    found = {}
    for name, written in ("plain", plain), ("marked", with_marks(plain, split, "+ '<|im_end|>' }}")):
        tokenizer.chat_template = written
        try:
            found[name] = ChatTemplate(tokenizer).answers(messages)
        except ConversationError:
            # Left out with a word, where somebody quotes the head of an answer and the answer is but reasoning.
            assert name == "plain" and "<|im_start|>assistant" in "".join(said)
            return
    assert "{% generation %}" in written
    assert found["plain"] == found["marked"]
