"""Converted files on real Xen: what stock xl saved, written again as versions 1 and 2, and brought back by convert.

litmus checks the pattern in its memory when it resumes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import lab
from lab import guests
from tests.support.writers.legacy import Legacy
from tests.support.writers.rewrite import as_v1, as_v2

ONLY = pytest.mark.parametrize("host", [lab.DEFAULT], indirect=True, ids=[f"xen-{lab.DEFAULT}"])


class Litmus:
    """A guest that was saved by stock xl, and comes back again and again."""

    def __init__(self, host: lab.Host, name: str, options: str, keep: Path) -> None:
        self.host, self.name = host, name
        start = len(host.guest_console(name))
        config = host.write(f"{name}.cfg", guests.litmus_config(name, memory=32, options=options))
        host.run(f"xl create -q {config}").check()
        self.at = host.wait_for_guest(name, "litmus: up ", after=start)
        result = host.run(f"xl save {name} /tmp/{name} && mv /tmp/{name} .", timeout=120).check()
        self.saved = keep / name
        (result.outputs / name).rename(self.saved)

    def put(self, data: bytes, what: str) -> str:
        """The same in another form, where the host finds it."""
        path = self.saved.with_name(f"{self.name}.{what}")
        path.write_bytes(data)
        return self.host.put(path)

    def comes_back(self, command: str) -> None:
        """Whether it resumes with its pattern intact; then it is destroyed."""
        self.host.run(f"set -e\n{command}", timeout=240).check()
        self.at = self.host.wait_for_guest(self.name, "litmus: pattern ok", after=self.at)
        self.host.run(f"xl destroy {self.name}; rm -f $TMPDIR/new*").check()


DEEP = pytest.mark.deep
OLD = [
    ("linear", 8, "xl"),
    ("tree", 4, "xenpv"),
    *(pytest.param(*which, marks=DEEP) for which in (("tree", 8, "xl"), ("linear", 4, "xl"), ("linear", 8, "xenpv"))),
]


@ONLY
@pytest.mark.parametrize(("form", "long", "tool"), OLD)
def test_legacy_streams_come_back(host: lab.Host, form: str, long: int, tool: str, tmp_path: Path) -> None:
    guest = Litmus(host, f"converted-{form}-{long}-{tool}", f"p2m={form}", tmp_path)
    old = guest.put(bytes(as_v1(guest.saved, Legacy(long))), "v1")
    convert = f"xenpv convert {old} $TMPDIR/new && xenpv verify --strict $TMPDIR/new"
    guest.comes_back(f"{convert}\n{tool} restore $TMPDIR/new")


@ONLY
@DEEP
def test_streams_come_back_by_way_of_pipes_and_cut_anew(host: lab.Host, tmp_path: Path) -> None:
    guest = Litmus(host, "converted-pipe", "p2m=linear", tmp_path)
    old = guest.put(bytes(as_v1(guest.saved, Legacy(4))), "v1")
    guest.comes_back(f"xenpv convert - - < {old} | cat > $TMPDIR/new\nxl restore $TMPDIR/new")
    v2 = guest.put(as_v2(guest.saved.read_bytes()), "v2")
    guest.comes_back(f"xl restore {v2}")  # it is one that stock xl takes
    guest.comes_back(f"xenpv convert --batch 100 {v2} $TMPDIR/new\nxl restore $TMPDIR/new")


IN_PLACE = """
for place in /usr/lib/xen-*/bin/convert-legacy-stream; do
    printf '#!/bin/sh\\nexec python3 -c "from xenpv.cli.convert_legacy_stream import run; run()" "$@"\\n' > $place
    chmod +x $place
done
"""


@ONLY
def test_xl_takes_legacy_files_by_our_shim(host: lab.Host, tmp_path: Path) -> None:
    """libxl runs convert-legacy-stream, with a pipe on either side, for what stock xl itself calls a legacy file."""
    guest = Litmus(host, "converted-stock", "p2m=linear", tmp_path)
    host.run(IN_PLACE).check()
    old = guest.put(bytes(as_v1(guest.saved, Legacy(8))), "v1")
    guest.comes_back(f"xl restore {old}")


@ONLY
@DEEP
def test_there_and_back_through_every_envelope(host: lab.Host, tmp_path: Path) -> None:
    """By way of libxl, libxc, libvirt and xenopsd, and in the end stock xl has it again."""
    guest = Litmus(host, "converted-around", "p2m=linear", tmp_path)
    saved, new = guest.put(guest.saved.read_bytes(), "v3"), "$TMPDIR/new"
    xml = host.write("around.xml", "<domain type='xen'><name>around</name></domain>\n")
    text = host.write("around.cfg", guests.litmus_config(guest.name, memory=32, options="p2m=linear"))
    guest.comes_back(
        f"xenpv convert --to libxl {saved} {new}1 && xenpv convert --to libxc {new}1 {new}2\n"
        f"xenpv convert --to libvirt --config {xml} {new}2 {new}3 && xenpv convert --to xenopsd {new}3 {new}4\n"
        f"xenpv convert --to xl --config {text} {new}4 {new}5 && xl restore {new}5"
    )
