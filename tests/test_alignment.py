"""Laws of two tokenizations of one text."""

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from opd_stream.cross_tokenizer.alignment import Alignment, align, matching_ids, readable
from opd_stream.cross_tokenizer.byte_tokenizer import ByteTokenizer
from opd_stream.errors import UserError
from tests.tiny_tokenizers import byte_level, metaspace, unigram

FAMILIES = ("small", "large", "llama", "unigram", "nfc")
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@cache
def family(name: str) -> ByteTokenizer:
    made = {
        "small": lambda: byte_level(300),
        "large": lambda: byte_level(420, specials=("<end>", "<think>", "<eos>")),
        "llama": metaspace,
        "unigram": unigram,
        "nfc": lambda: unigram(normalizer=normalizers.NFC()),
    }
    return ByteTokenizer(made[name](), name)


def stop_of(tokenizer: ByteTokenizer) -> tuple[int, ...]:
    return tuple(n for content, n in tokenizer.special_ids.items() if content in ("<eos>", "</s>"))


@cache
def matches(student: str, teacher: str) -> np.ndarray:
    one, other = family(student), family(teacher)
    return matching_ids(
        one,
        other,
        vocab_size=len(other.pieces) + 8,
        student_stops=stop_of(one),
        teacher_stops=stop_of(other),
    )


def aligned(
    student: str, teacher: str, ids: list[int], *, longest: int = 6, is_cut: bool = False
) -> Alignment:
    return align(
        family(student),
        family(teacher),
        np.array(ids, np.int32),
        student_ids_V=matches(student, teacher),
        max_chunk_tokens=longest,
        is_cut=is_cut,
    )


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60)
@given(text=ANY_TEXT)
@example(text="▁ literally <eos> </s> <0x41> \ufffd 😀e\u0301")
@example(text="  two  spaces\n\tand a line ")
def test_byte_offsets_round_trip(name: str, text: str) -> None:
    tokenizer, data = family(name), text.encode()
    found = tokenizer.read(text)
    starts = np.concatenate([[0], found.ends])[:-1]
    assert (found.ends >= starts).all()
    assert not len(found.ends) or found.ends[-1] == len(data)
    for token, start, end, exact in zip(found.ids, starts, found.ends, found.exact, strict=True):
        assert exact == (tokenizer.bytes_of.get(int(token)) == data[start:end])
    if name in ("small", "large") or (name == "llama" and "▁" not in text):
        assert found.exact.all()
        assert len(found.ids) or not text


@pytest.mark.parametrize("name", ["small", "large", "llama"])
@settings(max_examples=40)
@given(text=ANY_TEXT.filter(lambda text: "▁" not in text))
def test_the_library_decodes_the_ids_to_the_same_text(name: str, text: str) -> None:
    made = {"small": lambda: byte_level(300), "large": lambda: byte_level(420), "llama": metaspace}
    tokenizer = made[name]()
    ids = ByteTokenizer(tokenizer, name).read(text).ids.tolist()
    # The library strips one space at the start of a text; behind a prompt there is none to strip.
    before = ByteTokenizer(tokenizer, name).read(" x").ids.tolist()
    told = tokenizer.backend_tokenizer.decode([*before, *ids], skip_special_tokens=False)
    assert told.lstrip(" ").removeprefix("x") == text


@settings(max_examples=100)
@given(data=st.binary(max_size=40))
def test_readable_agrees_with_the_decoder_and_keeps_order(data: bytes) -> None:
    ends = np.arange(len(data) + 1)
    text, moved = readable(data, ends)
    assert text == data.decode(errors="replace")
    assert (np.diff(moved) >= 0).all()
    assert moved[-1] == len(text.encode())
    whole = {len(text[:place].encode()) for place in range(len(text) + 1)}
    for end, new in zip(ends.tolist(), moved.tolist(), strict=True):
        if new in whole:  # what is before it is text of its own
            assert data[:end].decode(errors="replace").encode() == text.encode()[:new]


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("student", ["small", "large", "llama"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), text=ANY_TEXT, is_cut=st.booleans())
def test_chunks_cover_both_and_conserve_sums(
    student: str, teacher: str, seed: int, text: str, is_cut: bool
) -> None:
    random = np.random.default_rng(seed)
    one = family(student)
    drawn = random.integers(0, len(one.pieces) + 4, 12).tolist()  # any ids, special ones too
    ids = [*one.read(text).ids.tolist(), *(n for n in drawn if n not in stop_of(one))]
    found = aligned(student, teacher, ids, is_cut=is_cut)
    assert len(found.student_chunk) == len(ids)
    for chunk in (found.student_chunk, found.teacher_chunk):
        inside = chunk[chunk >= 0]
        assert (np.diff(inside) >= 0).all()
        assert set(inside.tolist()) == set(range(len(found.trains)))
    logprobs = -random.exponential(2, len(found.teacher_ids))
    shares = found.shares(logprobs)
    for chunk in range(len(found.trains)):
        mine, theirs = found.student_chunk == chunk, found.teacher_chunk == chunk
        assert shares[mine].sum() == pytest.approx(logprobs[theirs].sum(), abs=1e-9)
        assert len(np.unique(shares[mine])) == 1
        if found.trains[chunk]:
            assert mine.sum() <= 6
            spelled = [one.bytes_of.get(ids[n]) for n in np.flatnonzero(mine)]
            read = [family(teacher).bytes_of.get(int(n)) for n in found.teacher_ids[theirs]]
            if None not in spelled:
                assert b"".join(spelled) == b"".join(read)  # pyright: ignore
                assert "\ufffd".encode() not in b"".join(spelled)  # pyright: ignore
    same = np.flatnonzero(found.same >= 0)
    assert found.trains[found.student_chunk[same]].all()
    for place in same.tolist():
        token = int(found.teacher_ids[found.same[place]])
        assert matches(student, teacher)[token] == ids[place]


@pytest.mark.parametrize("name", ["small", "large", "llama"])
@settings(max_examples=40)
@given(text=ANY_TEXT.filter(lambda text: "▁" not in text and "\ufffd" not in text))
def test_a_tokenizer_aligned_with_itself_is_itself(name: str, text: str) -> None:
    ids = family(name).read(text).ids.tolist()
    found = aligned(name, name, ids, is_cut=True)
    assert found.teacher_ids.tolist() == ids
    if all(family(name).bytes_of[token].isascii() for token in ids):
        assert found.same.tolist() == list(range(len(ids)))
        assert found.trains.all()
    known = len(family(name).pieces)
    expected = np.where(np.arange(known + 8) < known, np.arange(known + 8), -1)
    assert (matches(name, name) == expected).all()


def test_chunks_are_the_shortest() -> None:
    one, other = family("small"), family("large")
    text = " Monday Anna"
    ids = one.read(text).ids
    found = aligned("small", "large", ids.tolist(), longest=20)
    meet = set(one.read(text).ends.tolist()) & set(other.read(text).ends.tolist())
    assert len(found.trains) == len(meet)
    assert len(meet) > 1
    assert found.trains.all()


def test_long_chunks_and_broken_characters_do_not_train() -> None:
    ids = family("small").read(" Monday").ids.tolist()
    assert len(family("large").read(" Monday").ids) < len(ids)
    assert not aligned("small", "large", ids, longest=1).trains.all()
    assert aligned("small", "large", ids, longest=len(ids)).trains.all()
    broken = family("small").read("a😀b").ids.tolist()
    whole = aligned("small", "large", broken)
    del broken[2]  # a byte of the face
    found = aligned("small", "large", broken)
    assert whole.trains.all()
    assert found.trains[found.student_chunk[[0, -1]]].all()
    assert not found.trains[found.student_chunk[1:-1]].any()


def test_the_uneven_chunk_at_a_cut_does_not_train() -> None:
    ids = [*family("small").read("a").ids.tolist(), *family("small").read(" Mo").ids.tolist()]
    finished, cut = (aligned("small", "large", ids, is_cut=is_cut) for is_cut in (False, True))
    assert finished.same[-1] == -1
    assert finished.trains.all()
    assert cut.trains.tolist() == [*finished.trains[:-1].tolist(), False]
    even = aligned("small", "large", ids[:1], is_cut=True)
    assert even.same.tolist() == [0]
    assert even.trains.all()


def test_special_tokens_match_by_name_and_others_do_not_train() -> None:
    student = family("large")
    think = student.special_ids["<think>"]
    a = student.read("a").ids.tolist()
    same = aligned("large", "large", [*a, think, *a])
    assert same.same.tolist() == [0, 1, 2]
    other = aligned("large", "small", [*a, think, *a])
    assert len(other.teacher_ids) > 3  # its letters
    trained = other.trains[other.student_chunk]
    assert trained.tolist() == [True, False, True]
    written = aligned("large", "large", student.read("<think>").ids.tolist())
    assert think not in written.teacher_ids


def test_terminators_match_each_other_and_no_text() -> None:
    llama, small = family("llama"), family("small")
    (eos,), (end,) = stop_of(llama), stop_of(small)
    assert matches("small", "llama")[eos] == end
    assert (matches("small", "llama") == end).sum() == 1
    assert end not in matches("small", "llama")[small.read("<eos></s>").ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_put_in_front_of_a_text(name: str) -> None:
    found = family(name).read("Monday")
    assert found.exact.all()
    assert not family(name).pieces[int(found.ids[0])].startswith(("▁", "Ġ"))


def test_a_tokenizer_that_loses_spaces_is_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="drops spaces") as caught:
        ByteTokenizer(PreTrainedTokenizerFast(tokenizer_object=words), "models/words")
    assert "\n" not in str(caught.value)


def test_the_module_needs_numpy_alone() -> None:
    code = (
        "import sys, opd_stream.cross_tokenizer.alignment; "
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
