"""What the assistant wrote in a conversation, found in the text that a chat template makes of all of it.

A template may write a turn otherwise when it is the last one: it drops the reasoning of earlier turns, or adds an end
only at the end. So a conversation is rendered once, as a whole, and answers are looked for in that text:

- by the template's own ``{% generation %}`` marks, where it has them;
- else by rendering the conversation again with a character of a private-use plane at the ends of what the assistant
  says. Without these characters the two texts are the same, so their places are the answers' places, whatever the
  answers say, and whatever else says the same;
- else, where the template decides something by these very characters, by looking for the answers one after the other.

An answer begins where the template's generation prompt ends, and ends with what ends it: ``<|im_end|>``,
``<|eot_id|>``, ... What such a turn ends with is learnt from a conversation of two turns, once for each template.
"""

from __future__ import annotations

import logging
import re
from itertools import product

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from gaudi_lm.data.conversations import (
    FIRST_MARK,
    LAST_MARK,
    PIECES,
    REASONING,
    ConversationError,
    common_pieces,
    end_of_turn,
    mark_answers,
    one_line,
    variants,
)
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

MARKS = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CONTROL = re.compile(r"\s*(<[^<>\s]*>|\[[^\[\]\s]*\])")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has a ``chat_template``.
        stop_ids: tokens besides the EOS at which the model stops, as in ``config.eos_token_id``.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: int | list[int] | None = None):
        self.tokenizer = tokenizer
        stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
        self.stops = {*filter(None, [*tokenizer.convert_ids_to_tokens(list(stop_ids)), tokenizer.eos_token])}
        self.special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | self.stops
        self.in_parts, self.heads = False, set[str]()
        self.prompt = self.end = self.last_end = ""
        try:
            self._learn()
        except TemplateSyntaxError as error:
            raise UserError(
                f"the tokenizer's chat template is not valid Jinja: line {error.lineno}, {error}"
            ) from error
        except Exception:  # of the template's own code: what ends a turn is told by special tokens
            logger.debug("the chat template does not render a question alone", exc_info=True)

    def render(self, messages: list[dict], tools: list[dict] | None = None, **flags) -> tuple[str, list]:
        """The text of a conversation, and the parts that the template's own marks enclose.

        Raises:
            Exception: of any kind that the template's code may raise.
        """
        if self.in_parts:
            texts = [message.get("content") for message in messages]
            parts = [{"content": [{"type": "text", "text": text}]} if isinstance(text, str) else {} for text in texts]
            messages = [{**message, **part} for message, part in zip(messages, parts, strict=True)]
        template = self.tokenizer.get_chat_template(tools=tools)
        texts, marked = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            **flags,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], marked[0] if marked else []

    def _learn(self) -> None:
        """Find the generation prompt, and what ends an answer before another turn and at the end."""
        marks = [chr(FIRST_MARK + number) for number in range(4)]
        turns = [{"role": ("user", "assistant")[n % 2], "content": mark} for n, mark in enumerate(marks)]
        for before, self.in_parts in product(([], [{"role": "system", "content": "a"}]), (False, True)):
            try:
                text, _ = self.render([*before, *turns])
            except Exception as error:  # of the template's own code: it reads parts only, or wants a system message
                if isinstance(error, TemplateSyntaxError):
                    raise
                continue
            if marks[1] in text:
                break
        else:
            self.in_parts = False
            return
        between, last = text.split(marks[1])[1].split(marks[2])[0], text.split(marks[3])[1]
        asked, alone = (
            self.render([*before, turns[0]], add_generation_prompt=prompt)[0].split(marks[0])[1]
            for prompt in (True, False)
        )
        shared = common_pieces(asked, alone)
        # Where it is no addition, it stands in the turn before, as in "[INST] question [/INST]".
        self.prompt = (asked[len(shared) :] if asked[len(shared) :].strip() else asked).lstrip()
        self.end = self.last_end = end_of_turn(between, last, text.split(marks[0])[0])
        if not self.end:
            self.last_end = last.rstrip()
            first = CONTROL.match(between)
            # What stands alone before the next turn, or begins an answer, is the head of a turn and ends none.
            if first and between[first.end() :].strip() and not self.prompt.startswith(first[1]):
                self.end = first[0]
        self.heads = {
            head[1] for head in (CONTROL.match(between[len(self.end) :]), CONTROL.match(self.prompt)) if head
        }

    def answers(
        self, messages: list[dict], tools: list[dict] | None = None, first: int = 0
    ) -> tuple[str, list[tuple[int, int]], bool]:
        """The text of a conversation and what the assistant wrote in it.

        Args:
            messages: as :func:`gaudi_lm.data.conversations.read_messages` gives them.
            tools: what the assistant may call, as JSON schemas.
            first: number of the first message whose answer counts; one of weight 0 never does.

        Returns:
            ``(text, spans, closed)``: places of characters, in order and apart; and whether the last one ends with a
            token that ends turns.

        Raises:
            ConversationError: the template cannot render it, or an answer is not to be found.
        """
        problem = None
        for variant in variants(messages):
            try:
                text, marked = self.render(variant, tools)
            except Exception as error:  # whatever the template's code raises
                problem = problem or f"the chat template cannot render it ({one_line(error)})"
                continue
            counts = [n >= first and message.get("weight") != 0 for n, message in enumerate(variant)]
            try:
                located = [] if marked and all(counts) else self._locate(text, variant, tools)
            except ConversationError as error:
                problem = problem or str(error)
                continue
            spans = [(start, end) for number, start, end in located if counts[number]]
            if marked:
                others = [(start, end) for number, start, end in located if not counts[number]]
                spans = self._whole(text, [(a, b) for a, b in marked if all(b <= c or d <= a for c, d in others)])
            return text, spans, bool(spans) and self._closed(text[: spans[-1][1]], self.special)
        raise ConversationError(problem)

    def _closed(self, text: str, more: set[str] | frozenset[str] = frozenset()) -> bool:
        ends = {end.strip() for end in (self.end, self.last_end) if end} | self.stops | more
        return text.rstrip().endswith(tuple(ends))

    def _whole(self, text: str, marked: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Marked parts, joined where one follows the other, each with what ends its turn."""
        spans: list[tuple[int, int]] = []
        for start, end in marked:
            spans[-1:] = [(spans[-1][0], end)] if spans and spans[-1][1] == start else [*spans[-1:], (start, end)]
        limits = [start for start, _ in spans[1:]] + [len(text)]
        return [
            (start, end if self._closed(text[start:end]) else self._end(text, end, limit))
            for (start, end), limit in zip(spans, limits, strict=True)
        ]

    def _locate(self, text: str, messages: list[dict], tools: list[dict] | None) -> list[tuple[int, int, int]]:
        """(message, start, end) of each answer, in order.

        Raises:
            ConversationError: an answer, or a call of a tool, is not in the text.
        """
        for with_empty in (True, False):
            copies, marks = mark_answers(messages, with_empty)
            try:
                pieces = MARKS.split(self.render(copies, tools)[0])
            except Exception:  # of the template's own code, at text that it did not expect
                continue
            if "".join(pieces[::2]) == text:
                break
        else:
            return self._search(text, messages)
        positions, position = dict[str, int](), 0
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            position += len(piece)
            positions.setdefault(mark, position)
        anchors: list[tuple] = []
        for number, own in marks.items():
            found = [positions[mark] for mark in own if mark in positions]
            if not positions.keys() >= {*own[len(own) - len(messages[number].get("tool_calls") or ()) :]}:
                raise ConversationError(f"the chat template does not write the tool calls of message {number + 1}")
            if found:
                anchors.append((number, min(found), max(found)))
            elif not own:
                anchors.append((number, None, None))
        spans, done = [], 0
        for position, (number, begin, stop) in enumerate(anchors):
            limit = next((other for _, other, _ in anchors[position + 1 :] if other is not None), len(text))
            called, unmarked = bool(messages[number].get("tool_calls")), begin is None
            if unmarked:  # it is empty, and stands after the next generation prompt
                begin = stop = self._after_prompt(text, done, limit)
                if begin is None:
                    continue
            start, last = self._start(text, done, begin), number == len(messages) - 1
            if called or unmarked:
                stop = self._shared(text, stop, limit, messages[: number + 1], tools)
            if (called or unmarked) and self._closed(text[start:stop]):
                done = stop
            else:
                done = self._end(text, stop, limit, last, self.stops if called else self.special)
            spans.append((number, start, done))
        return spans

    def _shared(self, text: str, stop: int, limit: int, messages: list[dict], tools: list[dict] | None) -> int:
        """Where an answer stops that is more than its text, as calls of tools: what is written without later turns."""
        try:
            alone, _ = self.render(messages, tools)
        except Exception:  # of the template's own code
            return stop
        # The same place: what stands before it may differ, as the reasoning of a turn that is the last one here.
        before = text[max(0, stop - 12) : stop]
        after = alone.rpartition(before)[2] if before in alone else ""
        return stop + len(common_pieces(text[stop:limit], after).rstrip())

    def _start(self, text: str, done: int, begin: int) -> int:
        """Where an answer starts whose text begins at ``begin``: behind the generation prompt, or its beginning."""
        head, length = max(
            ((text.rfind(prompt, done, begin), len(prompt)) for prompt in self._prompts()), default=(-1, 0)
        )
        return begin if head < 0 else head + length

    def _after_prompt(self, text: str, done: int, limit: int) -> int | None:
        """Where the next generation prompt ends."""
        found = sorted((text.find(prompt, done, limit), -len(prompt)) for prompt in self._prompts())
        return next((head - length for head, length in found if head >= 0), None)

    def _prompts(self) -> list[str]:
        """The generation prompt, and starts of it that still name who speaks, the longest first."""
        pieces = PIECES.findall(self.prompt)
        least = next((n for n, piece in enumerate(pieces) if piece[0] not in "<[" and piece.strip()), 0)
        return ["".join(pieces[:count]) for count in range(len(pieces), least, -1)]

    def _end(self, text: str, stop: int, limit: int, last: bool = False, known: set[str] | None = None) -> int:
        """Where an answer ends whose text stops at ``stop``: behind what ends a turn, if that follows.

        Args:
            limit: where the next answer begins.
            last: no other message follows.
            known: tokens that end a turn where they follow; by default all special ones.
        """
        tail = text[stop:limit]
        bare = tail.lstrip()  # a template may strip what is said, or not
        for end in (self.last_end, self.end) if last else (self.end, self.last_end):
            if end and bare.startswith(end.lstrip()):
                return stop + len(tail) - len(bare) + len(end.lstrip())
        token = max((token for token in known or self.special if bare.startswith(token)), key=len, default="")
        if token in self.stops or (token and token not in self.heads):
            return stop + len(tail) - len(bare) + len(token)
        if last and not self.end:
            return stop + len(tail.rstrip())
        return stop

    def _search(self, text: str, messages: list[dict]) -> list[tuple[int, int, int]]:
        """As :meth:`_locate`, by looking for what the answers say, one after the other."""
        spans, done = [], 0
        heads = [text.count(prompt) for prompt in self._prompts()]
        if heads and heads[-1] > sum(message["role"] == "assistant" for message in messages):
            raise ConversationError("it quotes what the chat template writes before an answer, so none can be told")
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = message.get("content") or ""
            start, last = self._after_prompt(text, done, len(text)), number == len(messages) - 1
            end = re.escape((self.last_end if last else self.end).lstrip())
            behind = rf"\s*{end}(?!.*{end})" if last and end else rf"\s*{end}"  # as "hi" is found in "<think>" too
            said = {content, content.strip(), REASONING.split(content)[-1].strip()}
            begin = done if start is None else start
            found = [re.compile(f"({re.escape(words)}){behind}", re.DOTALL).search(text, begin) for words in said]
            position = min((match.span(1) for match in found if match), default=None)
            if position is None or message.get("tool_calls"):
                raise ConversationError(f"the chat template changes what message {number + 1} says")
            start = position[0] if start is None else start
            done = self._end(text, position[1], len(text), last)
            spans.append((number, start, done))
        return spans
