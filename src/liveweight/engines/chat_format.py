"""From messages to tokens and back.

Owns the chat template, where in the tokens a piece of the question lies, and turning a stream of tokens into text.
A model without a template completes plain text. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liveweight.engines.base import Message
from liveweight.errors import InvalidInput


class ChatFormat:
    """One tokenizer's way of writing a chat."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, system: str | None = None) -> None:
        """`system` is put before every chat that brings no system message of its own."""
        self.tokenizer = tokenizer
        self.system = system
        self.has_template = bool(tokenizer.chat_template)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        # A chat model's turn may end with another token than its text does.
        for end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
            number = tokenizer.get_vocab().get(end)
            if self.has_template and number is not None and end in str(tokenizer.chat_template):
                found.add(number)
        self.end_tokens: frozenset[int] = frozenset(number for number in found if number is not None)
        self.end_of_reply = self._end_of_reply()
        pad = tokenizer.pad_token_id
        self.pad_token: int = pad if pad is not None else next(iter(self.end_tokens), 0)

    def _end_of_reply(self) -> int | None:
        """The token that the template puts behind an assistant's turn; None for plain text, where no turn ends."""
        if not self.has_template:
            return None
        end: int | None = self.tokenizer.eos_token_id
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is a program of its own, and may take no finished chats
            return end
        place = self.locate_text(text, "Because.")
        behind = [] if place is None else self.encode_text(text)[place[1] + 1 :]
        return next((token for token in behind if token in self.end_tokens), end)

    def text(self, messages: Sequence[Message]) -> str:
        """The whole prompt as text, ready for the model's answer. Raises InvalidInput for an empty chat."""
        if not messages or not any(message.content.strip() for message in messages):
            raise InvalidInput("The chat is empty.", hint="Give at least one message with some text.")
        turns = list(messages)
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        if not self.has_template:
            return "\n".join(turn.content for turn in turns)
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates are programs of their own: whatever they raise is about the messages
            raise InvalidInput(
                f"The model's chat template refuses these messages: {error}",
                hint="Begin with a system or user message, and let user and assistant take turns.",
            ) from error
        return str(text)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The whole prompt as token ids."""
        return self.encode_text(self.text(messages), special=not self.has_template)

    def beginning_of(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens every chat begins with; 0 for a plain text."""
        if not self.has_template:
            return 0
        shared = 0
        for own, one, other in zip(prompt, *self._two_chats, strict=False):
            if not own == one == other:
                break
            shared += 1
        return shared

    @cached_property
    def _two_chats(self) -> tuple[list[int], list[int]]:
        """Two chats that have nothing in common but the template."""
        return self.encode([Message("user", "A")]), self.encode([Message("user", "why")])

    def encode_text(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts before plain text.

        Raises InvalidInput for what is no Unicode text, such as half an emoji.
        """
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except TypeError as error:  # tokenizers take no text that UTF-8 does not
            broken = next((each for each in text if "\ud800" <= each <= "\udfff"), None)
            if broken is None:
                raise
            raise InvalidInput(
                f"The text holds {broken!r}, which is half of a character.",
                hint="Was it cut in the middle of an emoji, or is it in another encoding than UTF-8?",
            ) from error
        return ids

    @cached_property
    def before_text(self) -> tuple[int, ...]:
        """What the tokenizer puts before plain text."""
        return tuple(self.encode_text("", special=True))

    def encode_continuation(self, prompt: Sequence[int], text: str) -> list[int]:
        """Token ids of a reply, as the model would write it right after `prompt`."""
        if not self.has_template and text and not text[0].isspace():
            text = " " + text  # plain text goes on after a space
        return self.encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def locate(self, messages: Sequence[Message], piece: str) -> tuple[int, int] | None:
        """First and last token, in `encode(messages)`, of the last occurrence of `piece`; None where it is not."""
        return self.locate_text(self.text(messages), piece, special=not self.has_template)

    def locate_text(self, text: str, piece: str, *, special: bool = False) -> tuple[int, int] | None:
        """The same in `encode_text(text, special=special)`."""
        start = text.rfind(piece)
        if start < 0 or not piece:
            return None
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        inside = [
            index
            for index, (first, last) in enumerate(encoded["offset_mapping"])
            if last > start and first < start + len(piece) and last > first
        ]
        return (inside[0], inside[-1]) if inside else None


class TextStream:
    """Turns tokens into text one at a time; a character split over tokens comes when it is whole."""

    def __init__(self, chat_format: ChatFormat) -> None:
        """Start with nothing said."""
        self._format = chat_format
        self._ids: list[int] = []
        self._from = 0  # tokens before this one are said and only give context
        self._said = ""

    def push(self, token: int) -> str:
        """What this token adds to the text; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._format.decode(self._ids[self._from :])
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._said) :]
        if len(self._ids) - self._from > 16 and new:
            # Decoding a short tail keeps long replies linear; one token of context keeps the spaces right. Not one that
            # is a piece of a character: with what comes it would make no text.
            tail = self._format.decode([token])
            if "\ufffd" not in tail:
                self._from, self._said = len(self._ids) - 1, tail
                return new
        self._said = text
        return new
