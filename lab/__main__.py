"""The lab's command line: python -m lab."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from . import packages, programs, trees, versions
from .errors import LabError
from .host import DEFAULT_TIMEOUT, Host, Job, shell
from .result import JobTimeout, Result

LOST = 125  # the VM died, or the lab could not run the command at all: says nothing about the command
TIMED_OUT = 124  # as timeout(1)

DESCRIPTION = """\
Boots real Xen under QEMU's software emulation (no KVM, no root, nothing installed) and runs commands in its dom0,
where the checkout is /xenpv and `xenpv` and `python3` find it.
"""
EXAMPLES = """\
examples:
  python -m lab deps                         install QEMU and the like (says what it does)
  python -m lab run -- xl info               on Xen %(default)s
  python -m lab run --xen 4.14 -- 'xl create /guests/debian.cfg; sleep 9; xl save debian /tmp/g; xenpv verify /tmp/g'
  python -m lab run --out kept -- 'xl dmesg > xen.log'
                                             what the command leaves in its working folder is kept in ./kept
  python -m lab shell                        look around by hand; `exit` ends the machine
"""
RUN = """\
Boots, runs COMMAND with bash in dom0, prints what it prints, and returns its exit status; 124 if it had to be killed
after --timeout, 125 if the VM was lost. One word is taken as a line for bash, several as a command and its arguments.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.action(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return LOST if options.action is _run else 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    epilog = EXAMPLES % {"default": versions.DEFAULT}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m lab", description=DESCRIPTION, epilog=epilog, formatter_class=raw)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    run = actions.add_parser("run", help="run a command in dom0", description=RUN, formatter_class=raw)
    run.set_defaults(action=_run)
    _add_machine(run)
    run.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="S", help="seconds (%(default)g)")
    run.add_argument("--out", type=Path, metavar="DIR", help="keep the command's working folder there")
    run.add_argument("command", nargs="+", metavar="COMMAND")

    shell_ = actions.add_parser("shell", help="an interactive shell in dom0; `exit`, or Ctrl-A X, ends the machine")
    shell_.set_defaults(action=_shell)
    _add_machine(shell_)

    fetch = actions.add_parser("fetch", help="bring packages into the cache now rather than at the first boot")
    fetch.set_defaults(action=_fetch)
    fetch.add_argument("--xen", action="append", default=[], choices=versions.names(), help="only for this version")
    fetch.add_argument("--prune", action="store_true", help="and remove what is not needed for these any more")

    deps = actions.add_parser("deps", help="install the programs that the lab needs, saying what it does")
    deps.set_defaults(action=_deps)
    deps.add_argument("--check", action="store_true", help="only say what is missing")

    table = actions.add_parser("versions", help="what is supported, and what is in the cache")
    table.set_defaults(action=_versions)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--xen", default=versions.DEFAULT, choices=versions.names(), help="version (%(default)s)")
    parser.add_argument("--mem", default="3G", metavar="SIZE", help="of the host, sparse: 700G is fine (%(default)s)")
    parser.add_argument("--dom0", default="2G", metavar="SIZE", help="of that, for dom0 (%(default)s)")


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    return {"mem": options.mem, "dom0_mem": options.dom0}


def _run(options: argparse.Namespace) -> int:
    command = options.command[0] if len(options.command) == 1 else shlex.join(options.command)
    with Host(options.xen, **_machine(options)) as host:
        job = host.start(command, timeout=options.timeout)
        try:
            status = _follow(job).status
        except JobTimeout as error:
            print(f"lab: killed after {error.result.seconds:.0f} s", file=sys.stderr)
            status = TIMED_OUT
        finally:
            if options.out:
                _keep(job.folder, options.out)
    return status


def _follow(job: Job) -> Result:
    """Print a job's output as it comes."""
    job.stdout.touch()
    job.stderr.touch()
    with job.stdout.open("rb") as stdout, job.stderr.open("rb") as stderr:
        pairs = ((stdout, sys.stdout.buffer), (stderr, sys.stderr.buffer))
        while not job.done():
            _copy_new(pairs)
            time.sleep(0.1)
        _copy_new(pairs)
    return job.wait()


def _copy_new(pairs: Sequence[tuple[BinaryIO, BinaryIO]]) -> None:
    for source, target in pairs:
        shutil.copyfileobj(source, target)
        target.flush()


def _keep(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        shutil.move(entry, out / entry.name)


def _shell(options: argparse.Namespace) -> int:
    if not sys.stdin.isatty():
        raise LabError("a shell needs a terminal; for scripts there is `python -m lab run`")
    return shell(options.xen, **_machine(options))


def _fetch(options: argparse.Namespace) -> int:
    packages.fetch(options.xen, prune=options.prune)
    return 0


def _deps(options: argparse.Namespace) -> int:
    lacking = {**programs.missing(), **programs.missing(programs.TESTS)}
    for program, package in lacking.items():
        print(f"missing: {program} (package {package})")
    if not lacking:
        print("all programs that the lab and the tests need are installed")
    elif not options.check:
        programs.install(lacking)
    return 1 if lacking and options.check else 0


def _versions(_options: argparse.Namespace) -> int:
    print("Xen   packages of  dom0's root  kernel  in the cache")
    for version in versions.SUPPORTED:
        found = "no"
        if all(tree.path.exists() for tree in trees.of_version(version.xen)):
            record = json.loads((trees.of_xen(version.xen).path / ".packages.json").read_text())
            found = record["packages"][f"xen-hypervisor-{version.xen}-amd64"]
        print(f"{version.xen}  {version.suite:11}  {version.root:11}  {version.kernel:6}  {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
