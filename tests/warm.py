"""Python processes that need not import torch: forks of a server that has imported it already (about 3 s a process).

`[*command(), "-c", code, …]` does what `[sys.executable, "-c", code, …]` does: with the same arguments, environment, working
directory, files and exit code. SIGINT and SIGTERM are passed on, and a process whose command is killed is killed too. Only
what runs at import differs: see `PRELOAD`. The server of a test process starts with the first `command()` and ends with it.

This file is all three programs: the module the tests import, `server` and `client`.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

# torch.optim imports torch._dynamo at an optimizer's first step.
PRELOAD = ("torch", "torch._dynamo", "torch.distributed.nn.functional", "mmtrain.train.loop", "mmtrain.log.report")
# Neither OpenBLAS nor Arrow's jemalloc may start a thread at import: a process with threads must not fork.
NO_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
PASSED_ON = (signal.SIGINT, signal.SIGTERM)


@cache
def command() -> tuple[str, ...]:
    """The beginning of a command line, in place of `sys.executable`."""
    directory = tempfile.TemporaryDirectory(prefix="mm-warm-")
    address = str(Path(directory.name) / "socket")
    server = subprocess.Popen(
        [sys.executable, __file__, "server", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **NO_THREADS, "PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
    )
    assert server.stdin and server.stdout

    def end() -> None:
        server.stdin.close()
        server.stdout.close()
        server.wait()
        directory.cleanup()

    atexit.register(end)
    assert server.stdout.readline() == b"ready\n"
    return sys.executable, "-I", "-S", __file__, "client", address


def client(address: str, arguments: list[str]) -> int:
    """Have the server run `python ARGUMENTS` with this process's files; return its exit code, or die by the same signal."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    socket.send_fds(connection, [b"f"], [0, 1, 2])
    stream = connection.makefile("rw")
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    pid = int(stream.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _frame: os.kill(pid, number))
    code = int(stream.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def server(address: str) -> dict[str, Any]:
    """Import, then fork for every connection until stdin ends; returns the request in each fork that is to run it."""
    for name in PRELOAD:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "an imported module has started a thread"
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        stream = connection.makefile("rw")
        request = json.loads(stream.readline())
        pid = os.fork()
        if pid == 0:
            stream.close()
            connection.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return request
        for file in files:
            os.close(file)
        watch(pid, connection, stream)


def watch(pid: int, connection: socket.socket, stream: TextIO) -> None:
    """Tell the client the process and its exit code; kill the process when the client is gone. Ends this fork."""
    with suppress(BrokenPipeError, ConnectionError):
        stream.write(f"{pid}\n")
        stream.flush()
        process = os.pidfd_open(pid)
        if process not in select.select([process, connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stream.write(f"{code}\n")
        stream.flush()
    os._exit(0)


def become(request: dict[str, Any]) -> tuple[str, str]:
    """Take on the environment, directory and arguments of a request; returns its code, and the name of its file."""
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    first, *rest = request["arguments"]
    if first == "-c":
        code, name = rest.pop(0), "<string>"
        sys.argv = ["-c", *rest]
        sys.path[0] = ""
    else:
        code, name = Path(first).read_text(encoding="utf-8"), first
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return code, name


if __name__ == "__main__":
    if sys.argv[1] == "client":
        sys.exit(client(sys.argv[2], sys.argv[3:]))
    code, name = become(server(sys.argv[2]))
    exec(compile(code, name, "exec"), {"__name__": "__main__", "__file__": name, "__builtins__": __builtins__})
