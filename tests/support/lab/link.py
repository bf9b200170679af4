"""What xl migrate has ssh for, between two lab hosts: runs a command on another machine.

python3 -m tests.support.lab.link HOST:PORT COMMAND…     xl migrate -s 'python3 -m tests.support.lab.link' DOM HOST:PORT
python3 -m tests.support.lab.link --listen PORT          on that machine: runs one command, with the link for its
                                                 standard input and output
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading


def call(where: str, command: list[str]) -> None:
    """Until the other side has ended."""
    host, _, port = where.rpartition(":")
    with socket.create_connection((host, int(port))) as link:
        link.sendall(shlex.join(command).encode() + b"\n")
        threading.Thread(target=_sent, args=(link,), daemon=True).start()
        while data := link.recv(1 << 16):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _sent(link: socket.socket) -> None:
    while data := os.read(0, 1 << 16):
        link.sendall(data)
    link.shutdown(socket.SHUT_WR)


def listen(port: int) -> int:
    """The status of the command."""
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)
        link, _ = server.accept()
    with link:
        line = b""
        while not line.endswith(b"\n"):
            line += link.recv(1)  # and not a byte of what the command is to read
        return subprocess.run(
            shlex.split(line.decode()), stdin=link.fileno(), stdout=link.fileno(), check=False
        ).returncode


if __name__ == "__main__":
    if sys.argv[1] == "--listen":
        sys.exit(listen(int(sys.argv[2])))
    call(sys.argv[1], sys.argv[2:])
