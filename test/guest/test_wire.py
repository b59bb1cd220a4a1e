"""The agent's protobuf codec against google.protobuf, which the host speaks."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katashim.guest import tables, wire
from katashim.ttrpc import proto

MESSAGES, SERVICES = tables.load()
CODEC = wire.Codec(MESSAGES)

_INTEGERS = {"int32": (-2**31, 2**31 - 1), "enum": (0, 1), "int64": (-2**63, 2**63 - 1),
             "uint32": (0, 2**32 - 1), "uint64": (0, 2**64 - 1)}


def scalars(kind):
    if kind == "string":
        return st.text(max_size=8)
    if kind == "bytes":
        return st.binary(max_size=8)
    if kind == "bool":
        return st.booleans()
    return st.integers(*_INTEGERS[kind])


def values(kind, detail, depth):
    return messages(detail, depth - 1) if kind == "message" else scalars(kind)


def messages(name, depth=3):
    """Strategy for messages of ours with some of their fields present."""
    fields = {}
    for _, field, kind, repeated, detail in MESSAGES[name]:
        if kind in ("message", "map") and depth == 0:
            continue
        if kind == "map":
            (key_kind, _), (value_kind, value_detail) = detail
            fields[field] = st.dictionaries(scalars(key_kind), values(value_kind, value_detail, depth),
                                            max_size=2)
        elif repeated:
            fields[field] = st.lists(values(kind, detail, depth), max_size=3)
        else:
            fields[field] = values(kind, detail, depth)
    cls = CODEC.type(name)
    return st.fixed_dictionaries({}, optional=fields).map(lambda present: cls(**present))


def as_google(message):
    """The same message as google.protobuf has it, by its own bytes."""
    return proto.get(message.NAME).FromString(CODEC.encode(message))


def same(ours, google):
    """Whether both say the same, field by field."""
    for field in ours.FIELDS:
        mine, theirs = getattr(ours, field.name), getattr(google, field.name)
        if field.kind == "map":
            assert set(mine) == set(theirs)
            assert all(_equal(mine[key], theirs[key]) for key in mine)
        elif field.repeated:
            assert len(mine) == len(theirs)
            assert all(_equal(a, b) for a, b in zip(mine, theirs))
        elif field.kind == "message" or field.detail == "optional":
            assert google.HasField(field.name) == (mine is not None)
            assert mine is None or _equal(mine, theirs)
        else:
            assert mine == theirs
    return True


def _equal(mine, theirs):
    return same(mine, theirs) if isinstance(mine, wire.Message) else mine == theirs


@given(st.sampled_from(sorted(MESSAGES)).flatmap(messages))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_message_means_the_same_to_google_and_comes_back(message):
    google = as_google(message)
    assert same(message, google)
    assert CODEC.decode(type(message), google.SerializeToString()) == message


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_every_message_type_has_googles_fields(name):
    descriptor = proto.get(name).DESCRIPTOR
    assert {(field.number, field.name) for field in descriptor.fields} == {row[:2] for row in MESSAGES[name]}


@given(st.binary(max_size=64), st.sampled_from(("grpc.CreateContainerRequest", "grpc.Spec", "ttrpc.Request")))
@settings(max_examples=200, deadline=None)
def test_no_bytes_do_more_than_raise_wire_error(data, name):
    try:
        CODEC.decode(CODEC.type(name), data)
    except wire.WireError:
        pass


@given(st.integers(0, 40))
@settings(deadline=None)
def test_a_message_cut_short_is_no_message_or_a_shorter_one(length):
    whole = CODEC.encode(CODEC.type("grpc.Storage")(driver="blk", source="02", options=["ro", "nodev"],
                                                    shared=True))
    try:
        CODEC.decode(CODEC.type("grpc.Storage"), whole[:length])
    except wire.WireError:
        assert length < len(whole)


def test_unknown_fields_are_passed_over():
    storage = CODEC.type("grpc.Storage")
    unknown = b"\x98\x06\x05" + b"\xa2\x06\x03abc" + b"\xa9\x06" + bytes(8) + b"\xb5\x06" + bytes(4)
    assert CODEC.decode(storage, unknown + CODEC.encode(storage(driver="x"))) == storage(driver="x")


def test_numbers_of_a_repeated_field_may_come_one_by_one():
    swap = CODEC.type("grpc.AddSwapRequest")
    assert list(CODEC.decode(swap, b"\x08\x02\x08\x85\x02").PCIPath) == [2, 261]


def test_a_message_that_comes_twice_is_merged():
    request = CODEC.type("grpc.ExecProcessRequest")
    process = CODEC.type("grpc.Process")
    parts = (process(Cwd="/a"), process(Terminal=True))
    data = b"".join(CODEC.encode(request(process=part)) for part in parts)
    assert CODEC.decode(request, data).process == process(Cwd="/a", Terminal=True)


def test_what_is_absent_reads_as_its_default():
    storage = CODEC.type("grpc.Storage")()
    assert (storage.driver, list(storage.options), storage.fs_group, storage.shared) == ("", [], None, False)


def test_a_field_that_does_not_exist_is_an_error():
    storage = CODEC.type("grpc.Storage")
    with pytest.raises(TypeError, match="nonsense"):
        storage(nonsense=1)
    with pytest.raises(AttributeError, match="nonsense"):
        storage().nonsense  # noqa: B018  reading it is the test


def test_a_number_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="uint32"):
        CODEC.encode(CODEC.type("grpc.FSGroup")(group_id=-1))


def test_nesting_has_an_end():
    level = {"Deep": ((1, "inner", "message", False, "Deep"),)}
    codec = wire.Codec(level)
    data = b""
    for _ in range(100):
        data = b"\x0a" + wire.varint(len(data)) + data
    with pytest.raises(wire.WireError, match="deep"):
        codec.decode(codec.type("Deep"), data)
