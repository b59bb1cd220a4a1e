"""katashim.log: the shape of a line, and writing that never waits."""

import fcntl
import json
import logging
import os
import re

import pytest

from katashim import log as log_module
from katashim.errors import HypervisorError

logger = logging.getLogger("katashim.drivers.qemu")


@pytest.fixture
def logging_restored():
    """Puts the root logger back as pytest had it."""
    root = logging.getLogger()
    ours = logging.getLogger("katashim")
    handlers, level, our_level = list(root.handlers), root.level, ours.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture
def lines(tmp_path, logging_restored):
    """Logging goes to a file; the value is a function that returns its records."""
    path = str(tmp_path / "log")
    log_module.setup([log_module.open_file(path)], sandbox="s1")

    def read():
        with open(path) as text:
            return [json.loads(line) for line in text]
    return read


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


def test_a_line_has_katas_field_names_in_a_fixed_order(lines):
    logger.info("started in %d ms", 12)
    record, = lines()
    assert list(record) == ["time", "level", "msg", "name", "pid", "source", "sandbox", "subsystem"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["time"])
    assert record["level"] == "info"
    assert record["msg"] == "started in 12 ms"
    assert record["pid"] == os.getpid()
    assert record["subsystem"] == "drivers.qemu"
    assert record["sandbox"] == "s1"


def test_context_adds_ids_inside_its_block_only(lines):
    with log_module.context(container="c1", exec=""):
        logger.info("outer")
        with log_module.context(exec="e1"):
            logger.info("inner")
    logger.info("after")
    outer, inner, after = lines()
    assert outer["container"] == "c1" and "exec" not in outer
    assert inner["container"] == "c1" and inner["exec"] == "e1"
    assert "container" not in after and "exec" not in after


def test_a_bound_logger_adds_its_ids_and_the_calls_own_fields(lines):
    log_module.bind(logger, container="c1", exec="e1").warning("slow", extra={"rpc": "State"})
    record, = lines()
    assert (record["container"], record["exec"], record["rpc"]) == ("c1", "e1", "State")
    assert record["level"] == "warning"


def test_an_exception_is_logged_with_its_trace_and_its_attachments(lines):
    try:
        raise HypervisorError("QEMU is gone").attach("console", "Kernel panic")
    except HypervisorError:
        logger.exception("start failed")
    record, = lines()
    assert "HypervisorError: QEMU is gone" in record["exc_info"]
    assert "Kernel panic" in record["exc_info"]


def test_a_field_of_any_length_or_type_becomes_one_line_of_valid_json(lines):
    logger.info("two\nlines \udc80 %s", "x" * 100_000, extra={"object": object()})
    record, = lines()
    assert record["msg"].startswith("two\nlines") and len(record["msg"]) < 40_000


def test_other_libraries_are_heard_from_warning_up_and_ours_from_the_level_given(lines):
    logging.getLogger("urllib3").info("chatter")
    logging.getLogger("urllib3").warning("trouble")
    logger.debug("detail")
    assert [record["msg"] for record in lines()] == ["trouble"]


def test_a_full_fifo_drops_whole_lines_and_says_how_many(fifo, logging_restored):
    sink = log_module.open_fifo(fifo)
    fcntl.fcntl(sink.fd, fcntl.F_SETPIPE_SZ, 4096)
    log_module.setup([sink])
    sent = 0
    while not sink.dropped:
        logger.info("record %d", sent)
        sent += 1
    for _ in range(5):
        logger.info("lost")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        text = os.read(reader, 1 << 20)
        logger.info("room again")
        text += os.read(reader, 1 << 20)
    finally:
        os.close(reader)
    records = [json.loads(line) for line in text.splitlines()]
    kept = [record for record in records if record["msg"].startswith("record ")]
    notice, = [record for record in records if "lost" in record]
    assert [record["msg"] for record in kept] == [f"record {number}" for number in range(len(kept))]
    assert records[-1]["msg"] == "room again"
    # Every record was written, or is counted as lost.
    assert len(kept) + notice["lost"] == sent + 5


def test_a_line_longer_than_the_room_arrives_whole_once_it_is_read(fifo, logging_restored):
    sink = log_module.open_fifo(fifo)
    fcntl.fcntl(sink.fd, fcntl.F_SETPIPE_SZ, 4096)
    log_module.setup([sink])
    logger.info("y" * 6000)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        text = os.read(reader, 1 << 20)
        logger.info("next")
        text += os.read(reader, 1 << 20)
    finally:
        os.close(reader)
    first, second = [json.loads(line) for line in text.splitlines()]
    assert first["msg"] == "y" * 6000 and second["msg"] == "next"


def test_a_reader_that_goes_away_is_no_error(fifo, logging_restored):
    os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    log_module.setup([log_module.open_fifo(fifo)])
    logger.info("nobody reads yet")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert json.loads(os.read(reader, 4096))["msg"] == "nobody reads yet"
    finally:
        os.close(reader)


def test_what_is_printed_on_stderr_becomes_records(lines):
    stream = log_module.LineStream(logger)
    print("Traceback\n  of the hub", file=stream)
    assert [(record["level"], record["msg"]) for record in lines()] == [
        ("error", "Traceback"), ("error", "  of the hub")]


def test_the_descriptor_on_stderr_is_non_blocking_and_stderr_itself_is_not(tmp_path):
    before = os.get_blocking(2)
    sink = log_module.open_named("stderr")
    try:
        assert not os.get_blocking(sink.fd)
        assert os.get_blocking(2) == before
    finally:
        sink.close()
