"""Runs the console blocks of a Markdown page, and holds what they print against what the page says.

A block begins with ```` ```console ````. A line `$ command` is run; `> ` continues it. The lines up to the next command
are what it prints, standard output and error together. `…` stands for any text within a line; alone on a line, for any
number of lines. All blocks of a page run in one shell, so variables and `cd` last. A comment before a block,
`<!-- not run: why -->`, leaves it out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ANYTHING = "…"
_BLOCK = re.compile(r"^(?P<skip><!-- not run: [^\n]* -->\n+)?```console\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_END = "\x01{}\x02"  # what the shell prints after each command: control characters that no command prints


@dataclass(frozen=True)
class Step:
    """One command of a page, the line it is on, and what it should print."""

    line: int
    command: str
    expected: str


def steps_of(page: str) -> list[Step]:
    """Return the commands of all console blocks that are run, in order."""
    steps = []
    for block in _BLOCK.finditer(page):
        if block["skip"]:
            continue
        first = page.count("\n", 0, block.start("text")) + 1
        command, line = "", first
        expected: list[str] = []
        for number, text in enumerate(block["text"].splitlines(), first):
            if text.startswith("$ "):
                if command:
                    steps.append(Step(line, command, "\n".join(expected)))
                command, expected, line = text[2:], [], number
            elif (text == ">" or text.startswith("> ")) and not expected:
                command += "\n" + text[2:]
            else:
                expected.append(text)
        steps.append(Step(line, command, "\n".join(expected)))
    return steps


def matches(expected: str, printed: str) -> bool:
    """Return whether a command printed what the page says; spaces at line ends and empty lines around do not count."""
    pattern = ""
    for line in _trimmed(expected).splitlines():
        if line.strip() == ANYTHING:
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.split(ANYTHING))) + r"\n"
    return re.fullmatch(pattern, _trimmed(printed) + "\n" if _trimmed(printed) else "") is not None


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def run_page(page: Path, folder: Path) -> None:
    """Run a page's commands in `folder`; AssertionError names the first line whose output differs."""
    steps = steps_of(page.read_text(encoding="utf-8"))
    assert steps, f"{page.name} has no console block"
    _write_commands(folder / ".bin")
    script = "".join(f"{step.command}\nlast=$?; printf '{_END.format('%d')}' $last; (exit $last)\n" for step in steps)
    environment = {
        "PATH": f"{folder / '.bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", "") or str(_SOURCE),
        "HOME": str(folder), "LANG": "C.UTF-8", "COLUMNS": "100", "NO_COLOR": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash"], input=script, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    outputs = re.split(r"\x01\d+\x02", done.stdout)
    for step, printed in zip(steps, outputs, strict=False):
        assert matches(step.expected, printed), (
            f"{page.name}:{step.line}: $ {step.command}\n--- the page says\n{step.expected}\n--- it printed\n{printed}"
        )
    assert len(outputs) == len(steps) + 1, f"{page.name}: the shell ended early: {outputs[-1]}"


_SOURCE = Path(__file__).parents[2] / "src"


def _write_commands(folder: Path) -> None:
    """Put `xenpv` and `python3` of this environment first in PATH, and `xz` where there is none."""
    folder.mkdir()
    run = "import sys; sys.argv[0] = 'xenpv'; from xenpv.cli.main import run; run()"
    unpack = "import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[-1]).read())"
    commands = {"xenpv": f'-c "{run}" "$@"', "python3": '"$@"'}
    if not shutil.which("xz"):
        commands["xz"] = f'-c "{unpack}" "$@"'
    for name, words in commands.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
        path.chmod(0o755)
