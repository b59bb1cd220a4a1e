"""The vsock device as a process, for tests: started as drivers/vsock.py starts it."""

import os
import signal
import socket
import subprocess
import sys

import katashim.drivers.vhost_user_vsock as package

MAIN = os.path.join(os.path.dirname(package.__file__), "__main__.py")
DEADLINE_S = 10


class Process:
    """A running device; its sockets listen from the first moment."""

    def __init__(self, directory, cid=42, linger_s=0.2):
        self.vhost_path = os.path.join(directory, "vhost.sock")
        self.uds_path = os.path.join(directory, "hybrid.sock")
        self.log_path = os.path.join(directory, "log")
        vhost, hybrid = _listener(self.vhost_path), _listener(self.uds_path)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-IS", MAIN, "--guest-cid", str(cid), "--socket", self.vhost_path,
                 "--uds-path", self.uds_path, "--socket-fd", str(vhost.fileno()),
                 "--uds-fd", str(hybrid.fileno()), "--until-eof", "0", "--linger", str(linger_s)],
                stdin=subprocess.PIPE, stderr=log, pass_fds=(vhost.fileno(), hybrid.fileno()))
        vhost.close()
        hybrid.close()

    def log(self):
        with open(self.log_path) as log:
            return log.read()

    def running(self):
        return self.process.poll() is None

    def wait(self):
        return self.process.wait(DEADLINE_S)

    def close(self):
        """End it; the status must be that of an orderly end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdin.close()
        assert status == 0, self.log()

    # -- a program of the host --------------------------------------------------------------------
    def dial(self, port, line=None):
        """A connection to the hybrid vsock that has sent its CONNECT line."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE_S)
        sock.connect(self.uds_path)
        sock.sendall(line if line is not None else b"CONNECT %d\n" % port)
        return sock

    def listen(self, port):
        """A program of the host that listens for the guest at `port`."""
        sock = _listener(f"{self.uds_path}_{port}")
        sock.settimeout(DEADLINE_S)
        return sock

    def cpu_ticks(self):
        with open(f"/proc/{self.process.pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        return int(fields[11]) + int(fields[12])

    def memory_kib(self, what="VmRSS"):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what))

    def open_fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def read_line(sock):
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            return line
        line += byte
    return line


def exactly(sock, count):
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        assert part, f"the stream ended after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


def is_closed(sock):
    """Wait for the end of a stream; False when data came instead."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def _listener(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(64)
    return sock
