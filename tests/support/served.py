"""Processes of another Python environment that are forked, because its imports take seconds.

`python served.py serve ADDRESS MODULE …` imports the modules and serves. `python served.py run ADDRESS
-m MODULE …` has the same effect as `python -m MODULE …` in the server's environment: the server forks a
process with the same arguments, environment variables, folder and streams.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any


@contextlib.contextmanager
def serving_python(
    python: str, variables: Mapping[str, str], *modules: str
) -> Iterator[SimpleNamespace]:
    """Inside the block, a stand-in for the module `subprocess` that runs `python -m …` by forks.

    Args:
        python: Python of the environment.
        variables: Environment variables of the server.
        modules: Modules to import before the forks.
    """
    with tempfile.TemporaryDirectory() as home:
        address = f"{home}/socket"

        def forked(command: Sequence[str]) -> list[str]:
            assert command[:2] == [python, "-m"]
            return [sys.executable, "-SE", __file__, "run", address, *command[1:]]

        def popen(command: Sequence[str], **options: Any) -> Any:
            return subprocess.Popen(forked(command), **options)

        def run(command: Sequence[str], **options: Any) -> Any:
            return subprocess.run(forked(command), **options)

        serving = [python, __file__, "serve", address, *modules]
        server = subprocess.Popen(serving, env=dict(variables), stdout=subprocess.PIPE)
        with server:
            try:
                assert server.stdout is not None and server.stdout.readline() == b"ready\n"
                yield SimpleNamespace(Popen=popen, run=run, PIPE=subprocess.PIPE)
            finally:
                server.kill()


def _serve(address: str, *modules: str) -> None:
    gc.disable()  # searching the many new objects takes a third of the time
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(client)
            client.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _answer(client: socket.socket) -> None:
    """Run a client's module in this process, send its exit code, and end."""
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    request = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    option, module, *arguments = request["arguments"]
    assert option == "-m"
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(bytes([code]))
    os._exit(code)


def _run(address: str, *arguments: str) -> int:
    """Have the arguments run by the server; return the exit code."""
    request = {"arguments": arguments, "folder": os.getcwd(), "variables": dict(os.environ)}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        return (server.recv(1) or b"\x01")[0]


if __name__ == "__main__":
    _, action, *given = sys.argv
    sys.exit({"serve": _serve, "run": _run}[action](*given))
