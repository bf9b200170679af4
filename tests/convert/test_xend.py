"""Files of xend (`xm save`, to Xen 4.4): a signature, a length, an s-expression, and a legacy stream.

The layout is that of xen.git@RELEASE-4.4.0:tools/python/xen/xend/XendCheckpoint.py save(), restore(): os.write(fd,
SIGNATURE), then the configuration after its length as pack("!i", …), then what xc_save writes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.saved_files import verify_file
from tests.support.writers.build import pv_domain
from tests.support.writers.legacy import Legacy, pv_stream
from xenpv.errors import StreamError, Unsupported
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore_domain
from xenpv.source.open import open_domain

UUID = "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab"
CONFIG = (
    f"(domain (domid 3) (cpu_weight 256) (uuid {UUID}) (name web) (vcpus 2) (memory 256) (maxmem 512) "
    "(on_reboot restart) (image (linux (kernel /boot/vmlinuz-xen) (args 'root=/dev/xvda1 name=(other)'))) "
    "(device (vif (uuid 1-2) (name x))))"
).encode()
DOMAIN = pv_domain(pfns=range(64), vcpus=2, tree=True)


def xend_file(config: bytes = CONFIG, *, length: int | None = None, long: int = 8) -> bytes:
    announced = len(config) if length is None else length
    return b"LinuxGuestRecord" + struct.pack("!I", announced) + config + bytes(pv_stream(DOMAIN, Legacy(long)))


@pytest.fixture(params=[8, 4], ids=["64-bit toolstack", "32-bit toolstack"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "web.xend"
    path.write_bytes(xend_file(long=request.param))
    return path


def test_show_of_a_xend_file_tells_name_uuid_and_memory(path: Path) -> None:
    shown = xenpv("show", "--json", path).json
    assert (shown["config"]["name"], shown["config"]["uuid"]) == ("web", UUID)
    assert (shown["config"]["target_memkb"], shown["config"]["max_memkb"]) == (256 << 10, 512 << 10)
    with open_domain(str(path)) as domain:
        for pfn, content in DOMAIN.pages.items():
            if not DOMAIN.types[pfn] & 7:
                assert domain.memory.page(pfn) == bytes(content)


def test_verify_of_a_xend_file_says_that_it_has_to_be_converted(path: Path) -> None:
    assert verify_file(path).rules == {"xend-file"}


def test_convert_of_a_xend_file_gives_a_file_for_xl(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "web.save"
    assert xenpv("convert", path, out).code == 0
    assert verify_file(out).rules == set()
    with open_domain(str(out)) as converted, open_domain(str(path)) as original:
        assert converted.saved is not None
        assert str(converted.saved.contents.envelope.kind) == "xl"  # type: ignore[union-attr]
        assert list(converted.pages()) == list(original.pages())


def test_restore_of_a_xend_file_is_refused(path: Path) -> None:
    host, source = ModelHost(64 << 20), Input.open(str(path))
    with pytest.raises(Unsupported):
        restore_domain(host, source)
    source.close()
    assert [info.domid for info in host.domains()] == [0]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (xend_file(length=len(CONFIG) - 5), "envelope"),
        (xend_file(length=len(CONFIG) + 5), "envelope"),
        (xend_file(length=0xFFFF_FFFF), "envelope"),
        (xend_file(CONFIG[:-9]), "envelope"),
        (xend_file(b""), "envelope"),
        (xend_file()[:18], "truncated"),
        (xend_file()[:200], "truncated"),
    ],
    ids=["short length", "long length", "huge length", "cut expression", "none", "cut header", "cut configuration"],
)
def test_damaged_xend_file_is_refused(data: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.xend"
    path.write_bytes(data)
    with pytest.raises(StreamError) as e:
        open_domain(str(path))
    assert e.value.rule == rule
    assert e.value.record == "xend header"
