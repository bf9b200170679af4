"""Runs jobs in dom0 for the lab: one JSON line in per job, one JSON line back when it has ended.

The lines go over a virtio serial port, so an answer arrives as soon as there is one. A job's output goes to files in
the folder that dom0 shares with the lab, so it may be binary and of any size.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

PORT = "xenpv.lab"
SHARE = Path("/share")
GRACE = 3.0  # seconds for a job to end by itself after SIGTERM


def port() -> Path:
    """There is no udev here to make /dev/virtio-ports."""
    while True:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                return Path("/dev") / name.parent.name
        time.sleep(0.02)


def signal_job(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended in the meantime
        os.killpg(process.pid, number)


def end(process: subprocess.Popen[bytes]) -> int | None:
    """Kill a job with all of its processes; None if it is stuck in the kernel and cannot be killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_job(process, number)
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    return None


def run(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    timed_out = False
    status: int | None
    folder = SHARE / job["folder"]
    with open(f"{folder}.stdout", "wb") as stdout, open(f"{folder}.stderr", "wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-c", job["command"]],
            cwd=folder,
            env={**os.environ, **job["env"]},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            status = process.wait(job["timeout"])
        except subprocess.TimeoutExpired:
            timed_out = True
            status = end(process)
    if status is not None and status < 0:
        status = 128 - status  # as a shell tells a signal
    return {"id": job["id"], "status": status, "timed_out": timed_out, "seconds": time.monotonic() - started}


def main() -> None:
    writing = threading.Lock()
    with port().open("r+b", buffering=0) as channel:

        def answer(message: dict[str, Any]) -> None:
            with writing:
                channel.write(json.dumps(message).encode() + b"\n")

        def serve(job: dict[str, Any]) -> None:
            try:
                answer(run(job))
            except OSError as error:
                answer({"id": job["id"], "error": str(error)})

        answer({"ready": True})
        pending = b""
        while data := channel.read(65536):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
