"""Conversations as people store them, as the lists of messages that chat templates read."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

FIRST_MARK, LAST_MARK = 0x100000, 0x10FFFD  # of Unicode's plane 16, which is for private use, and not in use by fonts
REASONING = re.compile(r"</?think>\s*")
SPOKEN = ("reasoning_content", "reasoning", "thinking", "content")  # what templates know of a message's text
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("ai", "bard", "bing", "bot", "chatbot", "chatgpt", "gpt", "model"), "assistant"),
    "function_call": "assistant",
    **dict.fromkeys(("function", "function_response", "observation", "tool_response"), "tool"),
}
PIECES = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s+|[^\s<\[]+|.")  # control tokens, white space, words


def common_pieces(left: str, right: str) -> str:
    """The longest start of both that does not end within a control token or a word."""
    length = 0
    for one, other in zip(PIECES.findall(left), PIECES.findall(right), strict=False):
        if one != other:
            break
        length += len(one)
    return left[:length]


def end_of_turn(between: str, last: str, before: str) -> str:
    """What ends an answer, without what begins the next turn.

    Args:
        between: what stands between an answer and the next question.
        last: what stands behind the last answer: a template may write the head of another answer there.
        before: what stands before the first question.
    """
    pieces = PIECES.findall(common_pieces(between, last))
    while sum(bool(piece.strip()) for piece in pieces) > 1 and before.endswith(between[len("".join(pieces[:-1])) :]):
        pieces.pop()
    return "".join(pieces).rstrip()


class ConversationError(ValueError):
    """One example cannot be read or rendered; says why."""


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def from_json(value: Any) -> Any:
    """A value, or what it says if it is JSON text of an object or a list."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, or JSON text of one."""
    value = from_json(value)
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(message, dict) and {"role", "from"} & message.keys() for message in value)
    )


def read_content(content: Any, number: int) -> dict[str, Any]:
    """The text of a message, which may be given in parts, as ``content`` and perhaps ``reasoning_content``."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        if content is None or isinstance(content, str):
            return {"content": content or ""}
        return {"content": json.dumps(content)}
    texts: dict[str, str] = {"content": ""}
    for part in content:
        kind = (part.get("type") or "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else None
        if isinstance(part, dict):
            text = next((part[key] for key in (kind, "text", "content") if isinstance(part.get(key), str)), None)
        if text is None or kind not in ("text", "input_text", "output_text", "thinking", "reasoning"):
            raise ConversationError(f"message {number} has a part of type {kind!r}, not text")
        key = "reasoning_content" if kind in ("thinking", "reasoning") else "content"
        texts[key] = texts.get(key, "") + text
    return texts


def is_data(content: Any) -> bool:
    """Whether what a tool returns is an object or a list, and not the text of a message in parts."""
    parts = content if isinstance(content, list) else [content]
    return isinstance(content, (dict, list)) and not all(
        isinstance(part, str) or (isinstance(part, dict) and {"type", "text", "content"} & part.keys())
        for part in parts
    )


def read_message(message: Any, number: int, role: str | None) -> dict[str, Any]:
    """A message with ``role`` and ``content``; other keys stay, as ``tool_calls``, ``name`` or ``weight``, 0 or 1."""
    if isinstance(message, str) and role:
        return {"role": role, "content": message}
    if not isinstance(message, dict):
        raise ConversationError(f"message {number} is a {type(message).__name__}, not an object with role and content")
    message = {key: part for key, part in message.items() if part is not None}
    role = next((message.pop(key) for key in ("role", "from", "sender", "speaker") if key in message), role)
    if not isinstance(role, str):
        raise ConversationError(f"message {number} has no role")
    content = next((message.pop(key) for key in ("content", "value", "text") if key in message), None)
    role = ROLES.get(role.lower(), role.lower())
    if role == "tool" and is_data(content):
        content = json.dumps(content, ensure_ascii=False)
    found = {"role": role, **read_content(content, number), **message}
    if found.get("weight", 1) not in (0, 1):
        raise ConversationError(f"message {number} has weight {found['weight']!r}, not 0 or 1")
    calls, only = (from_json(found.pop(key, None)) for key in ("tool_calls", "function_call"))  # the latter is older
    if calls := calls or (only and [only]):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ConversationError(f"the tool_calls of message {number} are no list of objects")
        found["tool_calls"] = [read_call(call) for call in calls]
    elif content is None and found["role"] == "assistant":
        raise ConversationError(f"message {number} has no content")
    return found


def read_call(call: dict) -> dict:
    """A tool call with ``type`` and ``function``, which has ``name`` and ``arguments``, an object if they are one."""
    call = {key: part for key, part in call.items() if part is not None}
    function = call.pop("function", None)
    if not isinstance(function, dict):
        function, call = call, {}
    function = {key: part for key, part in function.items() if part is not None}
    arguments = from_json(function.get("arguments", {}))
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def read_messages(value: Any, role: str | None = None) -> list[dict[str, Any]]:
    """A conversation as a list of messages with ``role`` and ``content``.

    Args:
        value: a list of messages (``role`` and ``content``, or ``from`` and ``value`` with the names of ShareGPT), a
            list of texts that user and assistant say in turn, an object that holds the list, or one of these as JSON.
        role: who says a plain text.

    Raises:
        ConversationError: there is no conversation, or a message cannot be read.
    """
    value = value if role and not is_conversation(value) else from_json(value)
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        nested = next((value[key] for key in ("messages", "conversations", "conversation") if key in value), None)
        columns = zip(*value.values(), strict=False)
        value = [dict(zip(value, parts, strict=False)) for parts in columns] if nested is None else nested
    elif isinstance(value, dict) and not {"role", "from"} & value.keys():
        value = next((value[key] for key in ("messages", "conversations", "conversation") if value.get(key)), value)
    if isinstance(value, dict) or (isinstance(value, str) and role and value.strip()):
        value = [value]
    if value is None or (isinstance(value, (str, list)) and not value):
        raise ConversationError("there is no conversation")
    if not isinstance(value, list):
        raise ConversationError(f"a {type(value).__name__} that is no list of messages, nor JSON of one")
    roles = [role] * len(value) if role else [("user", "assistant")[n % 2] for n in range(len(value))]
    plain = all(isinstance(message, str) for message in value)
    return [read_message(message, n + 1, roles[n] if plain or role else None) for n, message in enumerate(value)]


def read_tools(value: Any) -> list[dict] | None:
    """The tools of a conversation: a list of JSON schemas, or JSON text of one; none is None.

    Raises:
        ConversationError: it is something else.
    """
    tools = from_json(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConversationError("the tools are no list of JSON schemas")
    return tools


def variants(messages: list[dict]) -> list[list[dict]]:
    """A conversation as templates may want it: calls of tools without text have an empty one, or null, and their
    arguments are an object, or JSON text of one."""
    called = [message for message in messages if message.get("tool_calls")]
    found = [messages]
    if any(not message["content"] for message in called):
        found.append([{**m, "content": m["content"] or None} if m.get("tool_calls") else m for m in messages])
    if called:
        found += [[spell_arguments(message) for message in variant] for variant in found]
    return found


def spell_arguments(message: dict) -> dict:
    """A message whose tool calls have their arguments as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = copy.deepcopy(message["tool_calls"])
    for call in calls:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**message, "tool_calls": calls}


def mark_answers(messages: list[dict], with_empty: bool) -> tuple[list[dict], dict[int, list[str]]]:
    """Messages with marks at the ends of what the assistant says, inside of white space, which templates strip.

    Args:
        with_empty: also where it says nothing.

    Returns:
        ``(messages, marks)``: copies; and for each message of the assistant its marks.
    """
    copies, marks, count = [{**message} for message in messages], dict[int, list[str]](), 0

    def mark() -> str:
        nonlocal count
        own.append(chr(FIRST_MARK + count % (LAST_MARK - FIRST_MARK + 1)))
        count += 1
        return own[-1]

    for number, message in enumerate(copies):
        if message["role"] != "assistant":
            continue
        own = marks[number] = []
        for part in (part for part in SPOKEN if isinstance(message.get(part), str)):
            said, words = message[part], message[part].strip()
            if words:
                before, after = said.split(words)[0], said[said.index(words) + len(words) :]
                if words.endswith("think>"):  # what follows the reasoning is stripped of this white space, if anything
                    words, after = words + after, ""
                silent = ""
                if not with_empty and message.get("tool_calls") and words.rstrip().endswith("</think>"):
                    # A mark behind it would be text between the reasoning and the calls.
                    words, silent = words[: words.rindex("</think>")], words[words.rindex("</think>") :]
                # A template that drops the reasoning drops the marks before its end.
                words = REASONING.sub(lambda tag: tag[0] + mark(), mark() + words)
                message[part] = before + words + (silent or mark()) + after
            elif with_empty and part == "content" and not message.get("tool_calls"):
                message[part] = said + mark()
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "name": f"{call['function'].get('name')}{mark()}"}}
                for call in message["tool_calls"]
            ]
    return copies, marks
