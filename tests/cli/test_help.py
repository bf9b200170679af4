"""The help: it lists every verb, explains every option, and its examples are commands that parse."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.support.command import xenpv
from xenpv.cli.main import VERBS, main

NAMES = [verb for verbs in VERBS.values() for verb in verbs]
PROGRAM = "import sys; sys.argv[0] = 'xenpv'; from xenpv.cli.main import run; run()"


def command(verb: str) -> click.Command:
    found = main.get_command(click.Context(main), verb)
    assert found is not None
    return found


def examples(text: str) -> list[list[str]]:
    """Return the arguments of each ``xenpv …`` under "Examples:", without the remark and the shell's pipes after it."""
    block = re.split(r"\n\s*\n", text.partition("Examples:\n")[2])[0]
    calls = re.findall(r"(?:^|\| )\s*xenpv (.*?)(?=  |$| \| | > )", block, re.MULTILINE)
    return [shlex.split(call) for call in calls]


def parse(arguments: list[str]) -> None:
    """Parse the arguments of ``xenpv`` as if it ran, without running it. Raises click.UsageError."""
    context = main.make_context("xenpv", list(arguments), resilient_parsing=False)
    verb, *rest = arguments
    command(verb).make_context(verb, rest, parent=context)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_verb_on_one_line(option: str) -> None:
    ran = xenpv(option)
    assert (ran.code, ran.err) == (0, "")
    for verbs in VERBS.values():
        for verb, line in verbs.items():
            assert re.search(rf"^  {verb} +{re.escape(line)}$", ran.out, re.MULTILINE), verb


def test_help_imports_neither_numpy_nor_a_verb() -> None:
    code = (
        "import sys, xenpv.cli.main as m; m.main(['--help'], standalone_mode=False)\n"
        "print('numpy' in sys.modules, sorted(x for x in sys.modules if x.startswith('xenpv.cli.')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False ['xenpv.cli.main']"


@pytest.mark.parametrize("verb", NAMES)
def test_help_of_a_verb_begins_with_what_the_verb_does(verb: str) -> None:
    ran = xenpv(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: xenpv {verb}" in ran.out
    first_line = (command(verb).help or "").strip().splitlines()[0]
    assert first_line.endswith((".", ":")) or len(first_line) > 100


@pytest.mark.parametrize("verb", NAMES)
def test_help_of_a_verb_explains_every_option(verb: str) -> None:
    for option in command(verb).params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help[0].isupper(), option.help
            assert option.help.endswith((".", ")", "100M.")), option.help
            assert "unless said" not in option.help


@pytest.mark.parametrize("verb", NAMES)
def test_help_of_a_verb_has_examples_that_parse(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that an option requires to exist is there."""
    monkeypatch.chdir(tmp_path)
    Path("dom.xml").touch()
    found = [arguments for arguments in examples(command(verb).help or "") if arguments[0] == verb]
    assert found
    for arguments in found:
        if "--list-rules" not in arguments:  # prints the rules while it is parsed
            parse(arguments)


def test_main_help_has_examples_that_parse() -> None:
    found = examples(main.help or "")
    assert {arguments[0] for arguments in found} <= set(NAMES)
    assert len(found) >= 10
    for arguments in found:
        parse(arguments)


def test_parse_notices_an_example_with_a_wrong_option() -> None:
    with pytest.raises(click.UsageError):
        parse(["verify", "--no-such-option", "dom.save"])


def test_no_verb_prints_the_help() -> None:
    ran = xenpv()
    assert ran.code in {0, 64}
    assert "verify" in ran.out + ran.err


def test_version_is_printed() -> None:
    ran = xenpv("--version")
    assert ran.code == 0
    assert ran.out.startswith("xenpv, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed_for_each_shell(shell: str) -> None:
    environment = os.environ | {"_XENPV_COMPLETE": f"{shell}_source"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    if shell == "bash" and "bash" in ran.stderr.lower() and ran.returncode:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    assert "_XENPV_COMPLETE" in ran.stdout


def test_completion_of_ver_is_verify() -> None:
    environment = os.environ | {"_XENPV_COMPLETE": "bash_complete", "COMP_WORDS": "xenpv ver", "COMP_CWORD": "1"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "plain,verify\n"
