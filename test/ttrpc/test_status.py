import pytest

from katashim import errors
from katashim.ttrpc import proto, status


def response(data):
    return proto.decode(status.Response, data)


@pytest.mark.parametrize(("timeout_s", "nano"), [
    (None, 0), (1.5, 1_500_000_000), (1e-12, 1), (0, 1), (1e30, 2**63 - 1)])
def test_the_timeout_of_a_request(timeout_s, nano):
    request = proto.decode(status.Request, status.encode_request("s.S", "M", b"p", timeout_s))
    assert (request.service, request.method, request.payload) == ("s.S", "M", b"p")
    assert request.timeout_nano == nano


def test_metadata_goes_both_ways_in_lower_case_with_all_values():
    data = status.encode_request("s.S", "M", b"",
                                 metadata={"Containerd-Namespace-Ttrpc": "k8s.io", "x": ["1", "2"]})
    request = proto.decode(status.Request, data)
    assert request.metadata[0].key == "containerd-namespace-ttrpc"
    assert status.metadata_of(request) == {"containerd-namespace-ttrpc": ["k8s.io"], "x": ["1", "2"]}
    request.metadata[1].key = "X"           # as a Go client might put it on the wire
    assert status.metadata_of(request)["x"] == ["1", "2"]


def test_success_has_no_status():
    assert status.encode_response(b"") == b""
    assert not response(status.encode_response(b"x")).HasField("status")


def test_any_text_can_be_an_error():
    text = response(status.encode_error(errors.INTERNAL, "no file /tmp/\udcff\ud800")).status.message
    assert text == "no file /tmp/\\udcff\\ud800"
    long = response(status.encode_error(errors.INTERNAL, "x" * (5 << 20))).status.message
    assert len(long) < 100_000 and long.endswith(" ...")


@pytest.mark.parametrize(("code", "cls"), [
    (errors.NOT_FOUND, errors.NotFound), (errors.ALREADY_EXISTS, errors.AlreadyExists),
    (errors.UNIMPLEMENTED, errors.Unsupported), (errors.UNAVAILABLE, errors.Unavailable),
    (errors.DEADLINE_EXCEEDED, errors.DeadlineExceeded), (errors.CANCELLED, errors.Cancelled),
    (errors.UNKNOWN, errors.KatashimError), (errors.PERMISSION_DENIED, errors.KatashimError),
    (99, errors.KatashimError)])
def test_the_exception_of_a_code(code, cls):
    error = status.error_of(code, "s.S/M", "it broke")
    assert type(error) is cls and error.code == code
    assert error.message == "s.S/M: it broke"
    assert errors.status_of(error) == (code, "s.S/M: it broke")


def test_an_error_without_text_still_says_something():
    assert status.error_of(errors.INTERNAL, "s.S/M", "").message == "s.S/M: no reason given"
