import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katashim.ttrpc.frame import (
    DATA,
    HEADER_SIZE,
    MAX_MESSAGE,
    NO_DATA,
    REMOTE_CLOSED,
    REQUEST,
    RESPONSE,
    Decoder,
    Frame,
    MessageTooLong,
    Oversize,
    encode,
)

frames = st.builds(Frame, stream_id=st.integers(0, 2**32 - 1), type=st.integers(0, 255),
                   flags=st.integers(0, 255), payload=st.binary(max_size=300))


def split(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def feed_all(pieces):
    decoder = Decoder()
    return [item for piece in pieces for item in decoder.feed(piece)], decoder


def test_the_bytes_of_a_frame():
    assert encode(1, REQUEST, b"abc") == b"\0\0\0\3" b"\0\0\0\1" b"\1" b"\0" b"abc"
    assert encode(0xFFFFFFFF, DATA, b"", REMOTE_CLOSED | NO_DATA) == \
        b"\0\0\0\0" b"\xff\xff\xff\xff" b"\3" b"\5"


def test_one_frame_byte_by_byte():
    data = encode(7, RESPONSE, b"hello")
    decoder = Decoder()
    for index in range(len(data) - 1):
        assert decoder.feed(data[index:index + 1]) == []
        assert decoder.in_frame
    assert decoder.feed(data[-1:]) == [Frame(7, RESPONSE, 0, b"hello")]
    assert not decoder.in_frame


def test_several_frames_at_once_and_the_rest_is_kept():
    data = encode(1, REQUEST, b"a") + encode(3, DATA, b"") + encode(5, REQUEST, b"later")
    decoder = Decoder()
    assert decoder.feed(data[:-2]) == [Frame(1, REQUEST, 0, b"a"), Frame(3, DATA, 0, b"")]
    assert decoder.feed(data[-2:]) == [Frame(5, REQUEST, 0, b"later")]


def test_the_largest_frame_is_whole():
    payload = bytes(range(256)) * (MAX_MESSAGE // 256)
    data = encode(1, DATA, payload)
    items, _ = feed_all([data[start:start + 65536] for start in range(0, len(data), 65536)])
    assert items == [Frame(1, DATA, 0, payload)]


def test_one_byte_more_is_not_sent():
    with pytest.raises(MessageTooLong, match=f"message length {MAX_MESSAGE + 1} exceed maximum message size"):
        encode(1, DATA, bytes(MAX_MESSAGE + 1))


@pytest.mark.parametrize("chunk", [HEADER_SIZE, 4096, 1 << 23])
def test_an_oversize_frame_is_skipped_and_the_next_is_read(chunk):
    length = MAX_MESSAGE + 1
    header = length.to_bytes(4, "big") + encode(9, REQUEST)[4:]
    data = header + bytes(length) + encode(11, REQUEST, b"next")
    items, decoder = feed_all([data[start:start + chunk] for start in range(0, len(data), chunk)])
    assert items == [Oversize(9, REQUEST, 0, length), Frame(11, REQUEST, 0, b"next")]
    assert not decoder.in_frame


def test_an_oversize_frame_is_reported_once_its_last_byte_is_in():
    decoder = Decoder()
    header = (MAX_MESSAGE + 2).to_bytes(4, "big") + encode(9, REQUEST)[4:]
    assert decoder.feed(header + bytes(MAX_MESSAGE + 1)) == []
    assert decoder.in_frame
    assert decoder.feed(b"\0") == [Oversize(9, REQUEST, 0, MAX_MESSAGE + 2)]


def test_input_is_copied():
    buffer = bytearray(encode(1, REQUEST, b"first"))
    decoder = Decoder()
    [item] = decoder.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert item.payload == b"first"


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 4000), max_size=12))
def test_any_split_gives_the_same_frames(expected, cuts):
    data = b"".join(encode(item.stream_id, item.type, item.payload, item.flags) for item in expected)
    items, decoder = feed_all(split(data, cuts))
    assert items == expected
    assert not decoder.in_frame


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=12))
def test_random_bytes_never_fail_and_split_alike(data, cuts):
    whole, one = feed_all([data])
    pieces, two = feed_all(split(data, cuts))
    assert whole == pieces
    assert one.in_frame == two.in_frame
    assert sum(len(item.payload) + HEADER_SIZE for item in whole) <= len(data)
