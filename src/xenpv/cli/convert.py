"""``xenpv convert``: saved domains of any version, to the current stream version."""

from __future__ import annotations

from pathlib import Path

import click

from xenpv.cli.terminal import JSON, SEAL, SEAL_KEY, make_sealer, print_json, progress_bar
from xenpv.convert.convert import ConversionResult, ConvertOptions
from xenpv.convert.file import NotRestorable
from xenpv.convert.file import convert as convert_file
from xenpv.errors import RequestError
from xenpv.io.stream_input import Input
from xenpv.stream.envelope import CONFIG_MAX, INNER_KIND, Kind
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.text import counted, printable, size

_FORMATS = {b"{": "json", b"<": "xml", b"(": "sexp"}


@click.command()
@click.argument("source", metavar="IN", type=click.Path(allow_dash=True))
@click.argument("out", metavar="OUT", type=click.Path(allow_dash=True))
@click.option("--to", "kind", type=click.Choice([str(kind) for kind in INNER_KIND]), show_default="that of IN",
              help="Envelope of OUT.")  # fmt: skip
@click.option("--config", type=click.Path(exists=True, dir_okay=False), metavar="FILE", show_default="that of IN",
              help="Configuration to store in OUT: JSON or xl's text for xl, XML for libvirt.")  # fmt: skip
@click.option("--batch", type=int, metavar="N", show_default="as in IN",
              help="Repack the pages, N to a PAGE_DATA record.")  # fmt: skip
@click.option("--drop-zero", is_flag=True, help="Leave out the content of zero pages; safe only as described above.")
@click.option("--drop-emulator", is_flag=True,
              help="Leave out an HVM domain's device model if OUT has no place for it.")  # fmt: skip
@click.option("--width", type=click.Choice(["32", "64"]), show_default="detected from IN",
              help="Bits of the toolstack that wrote a legacy IN.")  # fmt: skip
@click.option("--guest", type=click.Choice(["pv", "hvm"]), show_default="detected from IN",
              help="Type of the domain in a legacy IN.")  # fmt: skip
@click.option(
    "--force",
    is_flag=True,
    help="Write OUT even if it would not restore (prints the errors), or replaces another kind of file.",
)
@SEAL
@SEAL_KEY
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
    seal: bool,
    seal_key: str | None,
    as_json: bool,
) -> int:
    """Convert a saved domain to the current stream version (3), in any envelope.

    IN is a save file of any age: a legacy stream of before Xen 4.6 (PV or HVM, of a 32-bit or 64-bit toolstack, also
    with pages that Remus compressed), or version 2 or 3; of xl, libvirt, xenopsd or xend (`xm save`), or a bare libxl
    or libxc stream. IN and OUT may be "-", a pipe. Of a Remus stream the last complete checkpoint counts.

    OUT passes `xenpv verify`. Otherwise no file OUT appears, and a pipe is left incomplete.

    --drop-zero makes OUT smaller. It is safe only if Xen runs with scrub-domheap; otherwise a page without content may
    hold what another domain left there.

    \b
    Examples:
      xenpv convert old.save new.save                  a stream of before Xen 4.6, for today's xl restore
      xenpv convert --to libxc dom.save dom.libxc
      xenpv convert --seal dom.save sealed.save        with digests of every page and record
      xenpv convert --to libvirt --config dom.xml dom.save dom.img
      zstd -dc old.save.zst | xenpv convert - new.save
    """
    if (width is None) is not (guest is None):
        raise click.UsageError("give both --width and --guest, or neither")
    toolstack = None if width is None else (int(width) // 8, Guest.PV if guest == "pv" else Guest.HVM)
    text, config_format = _read_config(config) if config else (None, "json")
    reader = Reader(legacy=LegacyFormat(toolstack=toolstack))
    options = ConvertOptions(
        Kind(kind) if kind else None,
        text,
        config_format,
        batch,
        drop_zero,
        drop_emulator,
        make_sealer(seal, seal_key),
    )
    stream = Input.open(source)
    try:
        with progress_bar("converting") as bar:
            result = convert_file(stream, out, options, reader=reader, force=force, progress=bar)
    except NotRestorable as e:
        for finding in e.findings[1:]:
            click.echo(printable(f"{finding.severity}: {finding}"), err=True)  # standard output may be the stream
        raise
    finally:
        stream.close()
    if as_json:
        if out != "-":
            print_json(_describe(result, out))
    else:
        _print_summary(result, out)
    return 0


def _read_config(path: str) -> tuple[bytes, str]:
    """Return the text of a configuration and its format."""
    with Path(path).open("rb") as file:
        text = file.read(CONFIG_MAX)
    if not text.strip():
        raise RequestError(f"{path}: is empty; a configuration has some text")
    return text, _FORMATS.get(text.lstrip()[:1], "xl")


def _describe(result: ConversionResult, out: str) -> dict[str, object]:
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
    shown = "standard output" if out == "-" else out
    lines = [
        f"{result.name}: {result.source_kind}, version {result.version}{guest}, {size(result.bytes_in)}",
        f"{shown}: {result.kind}, version 3, {result.pages} pages, {size(result.bytes_out)}",
    ]
    if result.zero_pages:
        lines.append(f"{result.zero_pages} zero pages have no content: {size(result.bytes_saved)} saved")
    if result.checkpoints:
        lines.append(f"{counted(result.checkpoints, 'checkpoint')}; OUT is the last complete one")
    if result.truncated:
        lines.append(f"IN is cut off after it: {result.truncated}")
    if result.omitted:
        lines.append(f"left out: {', '.join(sorted(set(result.omitted)))}")
    if result.kind is Kind.XL and not result.has_config:
        lines.append("OUT has no configuration: use xl restore CONFIG FILE, or --config")
    lines += [f"{finding.severity}: {finding}" for finding in result.findings]
    click.echo("\n".join(lines), err=True)
