"""``xenpv convert``: a saved domain of any version and envelope into one of today's."""

from __future__ import annotations

from pathlib import Path

import click

from xenpv.cli.terminal import JSON, print_json, progress_bar
from xenpv.convert.convert import ConversionResult, ConvertOptions
from xenpv.convert.file import NotRestorable
from xenpv.convert.file import convert as convert_file
from xenpv.errors import RequestError
from xenpv.io.stream_input import Input
from xenpv.stream.envelope import CONFIG_MAX, Kind
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.order import Guest
from xenpv.stream.reader import Reader
from xenpv.text import size

_FORMATS = {b"{": "json", b"<": "xml", b"(": "sexp"}


@click.command()
@click.argument("source", metavar="IN", type=click.Path(allow_dash=True))
@click.argument("out", metavar="OUT", type=click.Path(allow_dash=True))
@click.option("--to", "kind", type=click.Choice([str(kind) for kind in Kind]), help="The envelope; IN's unless said.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="What OUT carries: JSON or xl's text for xl, XML for libvirt; IN's, if that fits.")  # fmt: skip
@click.option("--batch", type=int, metavar="N", help="Cut PAGE_DATA anew, N pages to a record; as in IN unless said.")
@click.option("--drop-zero", is_flag=True, help="Leave out the content of pages that are zero: see above.")
@click.option(
    "--drop-emulator", is_flag=True, help="Leave out an HVM domain's device model, if OUT has no place for it."
)
@click.option(
    "--width", type=click.Choice(["32", "64"]), help="Bits of the toolstack of a legacy IN, if not by looking."
)
@click.option("--guest", type=click.Choice(["pv", "hvm"]), help="What a legacy IN holds, if not by looking.")
@click.option("--force", is_flag=True, help="Write OUT even if it would not restore; what is wrong is said.")
@JSON
def convert(
    source: str,
    out: str,
    kind: str | None,
    config: str | None,
    batch: int | None,
    drop_zero: bool,
    drop_emulator: bool,
    width: str | None,
    guest: str | None,
    force: bool,
    as_json: bool,
) -> int:
    """Convert a saved domain to the stream of today (version 3), in any envelope.

    IN is a save file of any age: legacy streams of before Xen 4.6 (of 32- and 64-bit toolstacks, PV and HVM, under
    Remus with compressed pages too), version 2 and 3; of xl, libvirt, xenopsd, or bare libxl and libxc. "-" is a pipe,
    on either side. Under Remus the last whole checkpoint counts.

    What comes out passes `xenpv verify`, or it is refused: then there is no OUT, and a pipe has no end.

    --drop-zero makes OUT smaller, and is safe only where Xen was started with scrub-domheap: elsewhere a page without
    content may come up with what another domain left there.

    \b
    xenpv convert old.save new.save            what xl restore of today takes
    xenpv convert --to libxc dom.save dom.libxc
    xenpv convert --to libvirt --config dom.xml dom.save dom.img
    zstd -dc old.save.zst | xenpv convert - new.save
    """
    if (width is None) is not (guest is None):
        raise click.UsageError("say --width and --guest, or neither")
    toolstack = None if width is None else (int(width) // 8, Guest.PV if guest == "pv" else Guest.HVM)
    text, config_format = _read_config(config) if config else (None, "json")
    reader = Reader(legacy=LegacyFormat(toolstack=toolstack))
    options = ConvertOptions(Kind(kind) if kind else None, text, config_format, batch, drop_zero, drop_emulator)
    stream = Input.open(source)
    try:
        with progress_bar("converting") as bar:
            result = convert_file(stream, out, options, reader=reader, force=force, progress=bar)
    except NotRestorable as e:
        for finding in e.findings[1:]:
            click.echo(f"{finding.severity}: {finding}", err=True)  # standard output may be the stream
        raise
    finally:
        stream.close()
    if as_json:
        if out != "-":
            print_json(_json(result, out))
    else:
        _print_summary(result, out)
    return 0


def _read_config(path: str) -> tuple[bytes, str]:
    with Path(path).open("rb") as file:
        text = file.read(CONFIG_MAX)
    if not text.strip():
        raise RequestError(f"{path}: is empty, not a domain's configuration")
    return text, _FORMATS.get(text.lstrip()[:1], "xl")


def _json(result: ConversionResult, out: str) -> dict[str, object]:
    return {
        "from": {
            "file": result.name,
            "envelope": result.source_kind,
            "version": result.version,
            "bytes": result.bytes_in,
        },
        "to": {"file": out, "envelope": result.kind, "version": 3, "bytes": result.bytes_out},
        "domain_type": None if result.guest is None else result.guest.name,
        "pages": result.pages,
        "dropped": result.zero_pages,
        "saved": result.bytes_saved,
        "checkpoints": result.checkpoints,
        "cut_off": result.truncated,
        "left_out": result.omitted,
        "findings": [finding.to_json() for finding in result.findings],
    }


def _print_summary(result: ConversionResult, out: str) -> None:
    """Print a summary on stderr, since standard output may be the stream."""
    guest = "" if result.guest is None else f" ({result.guest.name})"
    was = f"{result.source_kind}, version {result.version}{guest}"
    where = "standard output" if out == "-" else out
    click.echo(f"{result.name}: {was}, {size(result.bytes_in)}", err=True)
    click.echo(f"{where}: {result.kind}, version 3, {result.pages} pages, {size(result.bytes_out)}", err=True)
    if result.zero_pages:
        click.echo(
            f"{result.zero_pages} pages of zeros came without content: {size(result.bytes_saved)} saved", err=True
        )
    if result.checkpoints:
        click.echo(f"{result.checkpoints} checkpoints, of which the last whole one counts", err=True)
    if result.truncated:
        click.echo(f"what follows it was left out: {result.truncated}", err=True)
    if result.omitted:
        click.echo(f"left out: {', '.join(sorted(set(result.omitted)))}", err=True)
    if result.kind is Kind.XL and not result.has_config:
        click.echo("it carries no configuration: xl restore CONFIG FILE, or --config", err=True)
    for finding in result.findings:
        click.echo(f"{finding.severity}: {finding}", err=True)
