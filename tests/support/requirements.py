"""What tests need from the machine: programs, the lab, and the litmus kernel, which is built when it is missing."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

LITMUS = Path(__file__).parents[2] / "guests/litmus"
ALL_MUST_RUN = os.environ.get("CI") == "true" or os.environ.get("XENPV_TESTS") == "all"


def cannot_run(why: str) -> NoReturn:
    """Skip this test. Where all tests must run (CI, `make test` with all programs installed), fail it instead."""
    if ALL_MUST_RUN:
        pytest.fail(f"cannot run: {why}")
    pytest.skip(f"cannot run: {why}")


@functools.cache
def litmus_folder() -> Path:
    """Return the folder with litmus.elf and litmus-nop2m.elf, built from the sources as they are now."""
    for program in ("make", "gcc"):
        if not shutil.which(program):
            cannot_run(f"{program} is not installed; `make lab-deps` installs it")
    with (LITMUS / "Makefile").open() as lock:  # several test processes may come here at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "--silent", "-C", str(LITMUS)], check=True)
    return LITMUS / "build"
