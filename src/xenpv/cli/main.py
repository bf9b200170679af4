"""``xenpv``: the command group, and the exit status of every error."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from xenpv import __version__
from xenpv.errors import XenPVError, iter_notes
from xenpv.io.atomic_output import STANDARD_OUTPUT
from xenpv.io.process import use_one_blas_thread
from xenpv.io.signals import interruptible
from xenpv.text import printable

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_BUG = 70
EXIT_INTERRUPTED = 130


# One line of help for each verb, by kind of user. The verb "show" is the function show() in xenpv.cli.show, and so on.
# A verb's module is imported only when the verb runs: most need NumPy, whose import takes longer than `xenpv --help`.
VERBS = {
    "First steps": {
        "demo": "Build, save, verify and migrate a 600 GiB domain on a model of Xen.",
    },
    "Saved guests": {
        "show": "Show what a save file or core contains.",
        "verify": "Check whether a saved domain would restore.",
        "diff": "Compare two domains by page and by record.",
        "convert": "Convert a saved domain to the current stream version.",
    },
    "Running domains, in dom0": {
        "list": "List the domains of this host.",
        "check": "Cross-check a domain's p2m against Xen's M2P.",
        "build": "Build a PV domain from a kernel (offline: into a save file).",
        "save": "Save a PV domain to a file.",
        "restore": "Restore a PV domain from a save file.",
        "migrate": "Migrate a PV domain to another host.",
        "receive": "Receive a domain that `xenpv migrate` sends.",
    },
    "Debugging and forensics, of files and running domains": {
        "report": "Write an HTML report about a domain.",
        "export": "Export memory for drgn, crash, gdb or Volatility.",
        "walk": "Walk a virtual address through page tables.",
        "read": "Read memory at a virtual or physical address.",
        "p2m": "Show a p2m: form, anchors, entries and a map.",
    },
    "Kernels and domain layout": {
        "image": "Show whether a kernel boots as PV or PVH.",
        "layout": "Show where everything of a new PV domain will lie.",
    },
}


class _PeerGone(XenPVError):
    """The reader of a pipe or a connection has gone."""


class VerbGroup(click.Group):
    """Lists the verbs by kind of user and imports a verb's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all verbs, in the order of the help."""
        return [verb for verbs in VERBS.values() for verb in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a verb; None if there is no such verb."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = getattr(importlib.import_module(f"xenpv.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a verb.

        click ends in silence at any broken pipe; only that of standard output deserves it.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as e:
            if e.filename in {None, STANDARD_OUTPUT}:
                raise
            raise _PeerGone(f"{e.filename}: {e.strerror}") from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write a section of the help for each kind of user."""
        for user, verbs in VERBS.items():
            with formatter.section(user):
                formatter.write_dl(list(verbs.items()))


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xenpv")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Build, inspect, verify, save, restore and migrate Xen PV domains of any size.

    FILE is a save file of xl, libvirt or xenopsd, a bare libxl or libxc stream, or a core of `xl dump-core`; "-" reads
    a pipe. Commands on a FILE need no hypervisor. DOM is a running domain, by id, uuid or name, and needs root in dom0.

    \b
    Examples:
      xenpv verify dom.save                    Would it restore? If not: why not?
      zstd -dc dom.save.zst | xenpv verify -
      xenpv show dom.save                      Which domain is in this file?
      xenpv diff before.save after.save        What changed, by page and by field?
      xenpv convert old.save new.save          a stream of before Xen 4.6 to today's
      xenpv check web                          Is the p2m of this running domain right?
      xenpv migrate web otherhost              live, over ssh
      xenpv build vmlinuz --memory 640G --start
      xenpv report dom.save -o report.html     all about a domain on one page
      xenpv export dom.save dom.elf            a core for drgn, crash, gdb, Volatility
      xenpv walk dom.save 0xffffffff81000000
      xenpv image vmlinuz                      Can this kernel boot as PV? With how much memory?

    `xenpv COMMAND --help` explains a command and its options.

    \b
    Exit status:
      0    success
      1    findings, differences, or a failed operation
      64   wrong usage
      70   a bug in xenpv
      130  interrupted

    \b
    Shell completion:
      eval "$(_XENPV_COMPLETE=bash_source xenpv)"      or zsh_source, fish_source
    """
    ctx.with_resource(interruptible())  # no verb leaves an unfinished file or a half-moved domain


def run(command: click.Command = main) -> NoReturn:
    """Run the command line, turn errors into messages and exit statuses, and exit."""
    use_one_blas_thread()
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except click.UsageError as e:
        e.show()
        sys.exit(EXIT_USAGE)
    except click.Abort as e:
        click.echo("xenpv: interrupted", err=True)
        _print_notes(e)
        sys.exit(EXIT_INTERRUPTED)
    except XenPVError as e:
        _fail(str(e), e)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone: flush nothing into the pipe at exit
        sys.exit(EXIT_FAILED)
    except OSError as e:
        _fail(f"{e.filename or 'input'}: {e.strerror}" if e.strerror else str(e), e)
    except Exception:  # any other exception is a bug in xenpv
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        click.echo("xenpv: this is a bug in xenpv; please report it with the lines above", err=True)
        sys.exit(EXIT_BUG)


def _fail(message: str, error: BaseException) -> NoReturn:
    """Print an error, which may quote a hostile text, and what else failed after it."""
    click.echo(f"xenpv: error: {printable(message)}", err=True)
    _print_notes(error)
    sys.exit(EXIT_FAILED)


def _print_notes(error: BaseException) -> None:
    """Print what else failed after an error, such as a clean-up."""
    for note in iter_notes(error):
        click.echo(f"xenpv: note: {printable(note)}", err=True)
