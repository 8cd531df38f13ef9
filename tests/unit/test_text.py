"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncpipe.errors import Invalid
from asyncpipe_coordinator.text import ByteDetokenizer, ContextDetokenizer, StopStrings, TextCodec
from tests.checkpoints import save_tokenizer


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return TextCodec.load(directory)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_add_up_to_the_whole_text(codec: TextCodec, text: str) -> None:
    assume(not any(special in text for special in ("<s>", "<pad>", "</s>", "<unk>")))
    token_ids = codec.encode(text)[1:]
    detokenizer = codec.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == codec.decode(token_ids) == text


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.integers(0, 319), max_size=60))
def test_any_tokens_give_some_text_and_no_character_is_shown_half(codec: TextCodec, token_ids: list[int]) -> None:
    detokenizer = codec.detokenizer()
    shown = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.flush()
    whole = codec.decode(token_ids)
    assert shown.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_character_of_several_tokens_is_shown_when_it_is_complete(codec: TextCodec) -> None:
    token_ids = codec.encode("ab\U0001f9ff")[1:]
    detokenizer = codec.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert pieces[-1].endswith("\U0001f9ff")
    assert "\ufffd" not in "".join(pieces)


def test_prompts_begin_with_the_special_token_and_are_not_empty(codec: TextCodec) -> None:
    assert codec.encode("a")[0] == 2
    with pytest.raises(Invalid, match="empty"):
        codec.encode("")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no tokenizer"):
        TextCodec.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Invalid, match="cannot read the tokenizer"):
        TextCodec.load(tmp_path)


def test_the_two_file_tokenizer_of_older_checkpoints_is_read(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["to be or not to be"], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    trained.save_model(str(tmp_path))
    old = TextCodec.load(tmp_path)
    token_ids = old.encode("to be")
    assert token_ids[0] == 2
    assert old.decode(token_ids) == "to be"


@given(st.lists(st.text("abc", max_size=3)), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_what_is_shown_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        assert not any(text in shown for text in stop)
    shown += stops.flush()
    whole = "".join(pieces)
    ends = [whole.find(text) for text in stop if text in whole]
    assert stops.found is bool(ends)
    if not ends:
        assert shown == whole
    else:
        assert whole.startswith(shown)
        assert not any(text in shown for text in stop)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["END"])
    assert [stops.push(text) for text in ("one E", "N", "ough EN", "D two")] == ["one ", "", "ENough ", ""]
    assert stops.found


def test_byte_level_texts_are_put_together_as_the_tokenizer_does(codec: TextCodec) -> None:
    """Any tokens in any order: special ones, halves of characters, bytes that are no text."""
    rng = random.Random(5)
    assert isinstance(codec.detokenizer(), ByteDetokenizer)
    for _ in range(300):
        token_ids = [rng.randrange(330) for _ in range(rng.randrange(1, 40))]  # some are not in the vocabulary
        detokenizer = codec.detokenizer()
        pieces = [detokenizer.push(token_id) for token_id in token_ids]
        assert "".join(pieces) + detokenizer.flush() == codec.decode(token_ids)


def test_other_tokenizers_are_decoded_behind_their_context(codec: TextCodec) -> None:
    token_ids = codec.encode("naïve café ☃ to be")[1:]
    detokenizer = ContextDetokenizer(codec)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == codec.decode(token_ids)
