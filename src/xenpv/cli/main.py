"""``xenpv``: the group of all verbs, and what errors become."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from xenpv import __version__
from xenpv.errors import XenPVError

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_BUG = 70


# Where each verb is, and what it is for. They are imported when called, and not to be listed: most need NumPy, which
# takes longer to import than some take to run.
_VERBS = {
    "show": ("xenpv.cli.show", "What a save file or a core is: which domain, from where."),
    "verify": ("xenpv.cli.verify", "Would this saved domain restore, and as what was saved?"),
    "p2m": ("xenpv.cli.p2m", "A domain's p2m, running or saved: form, anchors, entries."),
    "check": ("xenpv.cli.check", "Hold a running domain's p2m against Xen's m2p, both ways."),
    "report": ("xenpv.cli.report", "A domain as a page that people look at."),
    "walk": ("xenpv.cli.walk", "Walk a virtual address through a domain's page tables."),
    "read": ("xenpv.cli.read", "Read memory at a virtual or pseudo-physical address."),
    "export": ("xenpv.cli.export", "Write a domain's memory as other tools read it."),
    "image": ("xenpv.cli.image", "What a kernel file is: can it boot as PV or PVH?"),
    "layout": ("xenpv.cli.layout", "Where everything of a PV domain lies when it starts."),
    "build": ("xenpv.cli.build", "Build a PV domain of any size from a kernel, in dom0."),
    "save": ("xenpv.cli.save", "Save a PV domain to a file, as xl save does."),
    "restore": ("xenpv.cli.restore", "Restore a PV domain from a save file."),
    "migrate": ("xenpv.cli.migrate", "Move a PV domain to another host, while it runs."),
    "receive": ("xenpv.cli.receive", "Take one domain that `xenpv migrate` sends."),
    "list": ("xenpv.cli.list", "The domains that run on this machine."),
    "convert": ("xenpv.cli.convert", "Convert a saved domain to the stream of today."),
    "diff": ("xenpv.cli.diff", "What differs between two domains, by page and by record."),
    "demo": ("xenpv.cli.demo", "A PV domain of 600 GiB built, saved, verified and migrated."),
}


class Verbs(click.Group):
    """The verbs, in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _VERBS:
            return None
        where, _ = _VERBS[cmd_name]
        command = getattr(importlib.import_module(where), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in _VERBS.items()])


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
    # Read when NumPy is imported. Nothing here multiplies matrices, and its threads take time to start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        click.echo("xenpv: this is a bug of xenpv's; please report it with the lines above", err=True)
        sys.exit(EXIT_BUG)
