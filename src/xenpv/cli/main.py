"""``xenpv``: the group of all verbs, and what errors become."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

import click

from xenpv import __version__
from xenpv.errors import XenPVError

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_BUG = 70


# Where each verb is. They are imported when called: most need NumPy, which takes longer to import than some take to
# run.
_VERBS = {
    "show": "xenpv.cli.show",
    "verify": "xenpv.cli.verify",
    "p2m": "xenpv.cli.p2m",
    "check": "xenpv.cli.check",
    "report": "xenpv.cli.report",
    "walk": "xenpv.cli.memory",
    "read": "xenpv.cli.memory",
    "export": "xenpv.cli.export",
    "image": "xenpv.cli.image",
    "layout": "xenpv.cli.layout",
    "build": "xenpv.cli.build",
    "save": "xenpv.cli.save",
    "restore": "xenpv.cli.save",
    "migrate": "xenpv.cli.migrate",
    "receive": "xenpv.cli.migrate",
    "list": "xenpv.cli.list",
    "convert": "xenpv.cli.convert",
    "diff": "xenpv.cli.diff",
    "demo": "xenpv.cli.demo",
}


class Verbs(click.Group):
    """The verbs, in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        command = getattr(importlib.import_module(_VERBS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xenpv")
def main() -> None:
    """Xen PV domains, saved and running: what they are, whether they would restore, what is in their memory.

    FILE is a save file of xl, libvirt or xenopsd, or a bare libxl or libxc stream; "-" reads a pipe.

    \b
    xenpv verify dom.save              will it restore? if not, why, down to the page-table entry
    xenpv show dom.save                what it is
    xenpv report dom.save -o report.html    all of that as a page to look at
    xenpv walk dom.save 0xffffffff81000000
    zstd -dc dom.save.zst | xenpv verify -
    xenpv export dom.save dom.elf      its memory as a core for drgn, gdb, crash, Volatility
    xenpv diff before.save after.save  what is not the same, page by page and field by field
    xenpv convert old.save new.save    from before Xen 4.6, or between envelopes, to what restores today
    xenpv image vmlinuz                what a kernel is; can it boot, with how much memory
    xenpv layout vmlinuz --memory 640G where everything of a domain would lie when it starts
    xenpv build vmlinuz --memory 4G --start    a PV domain of any size (in dom0)
    xenpv save DOM FILE                save it; xenpv restore FILE brings it back (in dom0)
    xenpv migrate DOM HOST             move it to another host while it runs (in dom0)
    xenpv list                         running domains (in dom0)
    xenpv check DOM                    hold a running domain's p2m against Xen's m2p

    Shell completion: eval "$(_XENPV_COMPLETE=bash_source xenpv)" (or zsh_source, fish_source).
    Exit status: 0 fine, 1 findings or a failed operation, 64 usage, 70 a bug of xenpv's.
    """


def run(command: click.Command = main) -> NoReturn:
    """Run the command line and exit."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except click.UsageError as e:
        e.show()
        sys.exit(EXIT_USAGE)
    except click.Abort:
        click.echo("xenpv: interrupted", err=True)
        sys.exit(130)
    except XenPVError as e:
        click.echo(f"xenpv: error: {e}", err=True)
        sys.exit(EXIT_FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads; say nothing at exit either
        sys.exit(EXIT_FAILED)
    except OSError as e:
        click.echo(f"xenpv: error: {e.filename or 'input'}: {e.strerror}", err=True)
        sys.exit(EXIT_FAILED)
    except Exception:  # everything else is a bug of ours, and says so
        traceback.print_exc()
        click.echo("xenpv: this is a bug of xenpv's; please report it with the lines above", err=True)
        sys.exit(EXIT_BUG)
