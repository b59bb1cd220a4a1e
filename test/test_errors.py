"""katashim.errors: which gRPC code and which words a caller gets."""

import pytest

from katashim import errors
from katashim.errors import AgentError, KatashimError, QmpError, RestError

CODES = {
    errors.NotFound: 5, errors.AlreadyExists: 6, errors.InvalidArgument: 3, errors.FailedPrecondition: 9,
    errors.Unsupported: 12, errors.Unavailable: 14, errors.DeadlineExceeded: 4, errors.ResourceExhausted: 8,
    errors.Cancelled: 1, errors.Internal: 13, errors.ConfigError: 3, errors.HypervisorError: 13,
    errors.ConnectionClosed: 14, KatashimError: 13,
}


@pytest.mark.parametrize("cls", CODES, ids=lambda cls: cls.__name__)
def test_codes(cls):
    assert errors.status_of(cls("text")) == (CODES[cls], "text")


def test_no_class_is_forgotten():
    special = {QmpError, RestError, AgentError}
    found = {cls for cls in vars(errors).values()
             if isinstance(cls, type) and issubclass(cls, Exception)}
    assert found - special == set(CODES)


@pytest.mark.parametrize("exc, code, text", [
    (FileNotFoundError(2, "No such file", "/x"), 5, "/x"), (FileExistsError(17, "There is one", "/x"), 6, "/x"),
    (PermissionError(13, "Not for you", "/x"), 7, "/x"), (OSError(28, "No space left"), 13, "No space left"),
    (KeyError("x"), 13, "did not foresee: KeyError: 'x'"), (ZeroDivisionError(), 13, "ZeroDivisionError")])
def test_what_was_not_foreseen_has_a_code_too(exc, code, text):
    got, words = errors.status_of(exc)
    assert got == code and text in words


def test_evidence_follows_the_message_once():
    error = errors.NotFound("no VM").attach("console", "panic\n").attach("phases", "")
    error.attach("console", "something else")
    assert str(error) == error.message == "no VM"
    assert error.full_text() == "no VM\n--- console:\npanic"
    assert errors.status_of(error) == (5, error.full_text())


def test_the_agents_stack_trace_is_evidence_not_message():
    error = AgentError(5, "WaitProcess", "InvalidExecId\n\nStack backtrace:\n   0: main")
    assert error.code == 5 and str(error) == "the guest's agent refused WaitProcess: InvalidExecId"
    assert error.full_text().endswith("--- stack trace of the agent:\n\n   0: main")
    assert AgentError(13, "X", "why").full_text() == "the guest's agent refused X: why"


def test_what_a_vmm_said_is_in_the_message():
    error = QmpError("GenericError", "no such device", {"execute": "device_del", "arguments": {"id": "d"}})
    assert str(error) == "QEMU refused 'device_del': no such device (GenericError)"
    assert str(RestError(404, " gone \n", "PUT /vm.boot")) == "PUT /vm.boot answered 404: gone"
    assert str(RestError(500, "", "PUT /vm.boot")) == "PUT /vm.boot answered 500: no text"
    assert len(str(RestError(500, "x" * 10_000, "r"))) < 2100


def test_a_lost_connection_says_whether_it_may_have_been_done():
    assert errors.ConnectionClosed("x", maybe_executed=True).maybe_executed
    assert not errors.ConnectionClosed("x").maybe_executed
