"""``xenpv demo``: the main job on a real saved domain that comes with the package."""

from __future__ import annotations

import lzma
import tempfile
from importlib.resources import files

import click

from xenpv.cli.show import describe, print_description
from xenpv.cli.verify import summary
from xenpv.domain.verify import verify

SAVED = "demo.save.xz"  # tests/vectors/README.md has the command that made it


@click.command()
def demo() -> int:
    """Show and verify a real saved domain that comes with xenpv: a litmus guest, saved by stock xl on Xen."""
    data = lzma.decompress(files("xenpv.cli").joinpath(SAVED).read_bytes())
    with tempfile.NamedTemporaryFile(prefix="xenpv-demo-", suffix=".save") as file:
        file.write(data)
        file.flush()
        report = verify(file.name)
        assert report.saved is not None
        with report.saved as saved:
            report.name = saved.name = "demo.save"
            print_description(saved, describe(saved), verbose=False)
            for finding in report.findings:
                click.echo(f"{finding.severity}: {finding}")
            click.echo(summary(report))
    click.echo("\nNext, on a file of your own:  xenpv verify FILE    xenpv show -v FILE    xenpv walk FILE VADDR")
    return 0 if report.ok else 1
