"""Text to tokens, tokens to text as they come, and stop strings."""

from __future__ import annotations

import codecs
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncpipe.errors import Invalid

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PARALLELISM = "TOKENIZERS_PARALLELISM"
REPLACEMENT = "\ufffd"


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()
CONTEXT_TOKENS = 6  # tokens before a new one that may change how it is written (spaces, byte sequences)


class TextCodec:
    """A checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = ByteTokens(self._look_up)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, path: Path) -> TextCodec:
        """From tokenizer.json, or from OPT's vocab.json and merges.txt. Raises Invalid."""
        from tokenizers import Tokenizer

        # It is not for single texts, and processes that are started after it was used complain.
        os.environ.setdefault(PARALLELISM, "false")
        file = path / "tokenizer.json"
        try:
            if file.is_file():
                return cls(Tokenizer.from_file(str(file)))
            if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
                return cls(_gpt2_style(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise Invalid(f"cannot read the tokenizer in {path}: {error}") from None
        raise Invalid(f"{path} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")

    def encode(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids with the special tokens that the tokenizer adds. Raises Invalid for an empty text, and for one that is
        longer than any of `max_tokens`."""
        if not text:
            raise Invalid("the prompt is empty: give at least one character")
        if max_tokens is not None and len(text) > max_tokens * self._longest_token:
            raise Invalid(f"the prompt has {len(text):,} characters, which are more than {max_tokens:,} tokens in any case")
        (encoding,) = self._tokenizer.encode_batch_fast([text])  # `encode` lets no other thread run meanwhile
        return tuple(encoding.ids)

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Of a text that has its special tokens in it: none are added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one text."""
        from tokenizers.decoders import ByteLevel

        if isinstance(self._tokenizer.decoder, ByteLevel):
            return ByteDetokenizer(self._tokens)
        return ContextDetokenizer(self)

    def _look_up(self, token_id: int) -> bytes:
        """What a byte-level token stands for; nothing for a special one."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token is written as it is
            return token.encode()


class Detokenizer(Protocol):
    """`push` each token; what it returns, put together with the final `flush`, is the decoded whole.

    Text that ends within a character is held back until the character is complete.
    """

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """The rest, even if its last character is incomplete."""
        ...


class ByteTokens(dict[int, bytes | str]):
    """What byte-level tokens stand for, looked up once: text where it is plain ASCII, as most is, else bytes."""

    def __init__(self, look_up: Callable[[int], bytes]) -> None:
        super().__init__()
        self._look_up = look_up

    def __missing__(self, token_id: int) -> bytes | str:
        data = self._look_up(token_id)
        found = self[token_id] = data.decode("ascii") if data.isascii() else data
        return found


class ByteDetokenizer:
    """For byte-level vocabularies, where a text is its tokens' bytes one after the other."""

    def __init__(self, tokens: ByteTokens) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_within_character = False

    def push(self, token_id: int) -> str:
        piece = self._tokens[token_id]
        if isinstance(piece, str):
            if not self._is_within_character:
                return piece
            piece = piece.encode("ascii")
        text = self._decoder.decode(piece)
        self._is_within_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ContextDetokenizer:
    """For any tokenizer.

    A token is decoded behind the few tokens before it, because a tokenizer may write it differently at the start of a text.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []  # context, then what is not shown yet
        self._num_context = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        self._tokens.append(token_id)
        text = self._codec.decode(self._tokens)
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._num_context < CONTEXT_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._codec.decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._tokens = self._tokens[-CONTEXT_TOKENS:]
        self._context_text = self._codec.decode(self._tokens)
        self._num_context = len(self._tokens)
        return new


class StopStrings:
    """Passes text on, but never a stop string, nor the beginning of what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.is_active = bool(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now. Once a stop string is complete, `found` is set and everything from it on is dropped."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text held back, when no more will come."""
        shown, self._held = self._held, ""
        return "" if self.found else shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def _gpt2_style(path: Path) -> Tokenizer:
    """OPT's older checkpoints: byte-level BPE in two files, every text begins with `</s>`."""
    from tokenizers import ByteLevelBPETokenizer, processors

    base = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"), add_prefix_space=False)
    end = base.token_to_id("</s>")
    tokenizer: Tokenizer = base._tokenizer
    if end is not None:
        tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", end)])
    return tokenizer
