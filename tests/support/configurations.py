"""Configurations of a saved domain: such that a toolstack refuses, such that it ignores in part, and sound ones."""

from __future__ import annotations

import json
from typing import Any

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import CONFIG_SEXP, config_json
from tests.support.writers.stream import Stream
from xenpv.findings import Rule
from xenpv.stream import rules

UUID = "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab"
KIB = 4 * len(pv_domain().pages)
GOOD = json.loads(config_json(memory_kib=KIB))
XML = (
    "<domain type='xen'><name>made</name><uuid>{uuid}</uuid><memory>{memory}</memory>"
    "<os><type>{type}</type></os></domain>"
)
RECORD = '((time 20240101T00:00:00Z)(word_size 64)(vm_str"((id x)(ty({type}((boot ())))))"))'


def with_members(part: str, **members: Any) -> bytes:
    """xl's configuration with other members in c_info or b_info; None takes one away."""
    config = json.loads(json.dumps(GOOD))
    config[part] = {key: value for key, value in (config[part] | members).items() if value is not None}
    return json.dumps(config).encode()


def xml(uuid: str = UUID, memory: object = KIB, kind: str = "linux") -> bytes:
    return XML.format(uuid=uuid, memory=memory, type=kind).encode()


def xl(**lines: object) -> bytes:
    return "".join(
        f"{key} = {value}\n" for key, value in ({"name": "'made'", "kernel": "'/boot/x'", "memory": 1} | lines).items()
    ).encode()


TEXT = config_json(memory_kib=KIB)
BAD: dict[str, tuple[str, bytes, Rule]] = {
    "JSON is cut": ("xl", TEXT[:-2], rules.CONFIG_SYNTAX),
    "JSON is no UTF-8": ("xl", TEXT.replace(b"made", b"m\xffde"), rules.CONFIG_SYNTAX),
    "JSON has NaN": ("xl", TEXT.replace(b"%d" % KIB, b"NaN"), rules.CONFIG_SYNTAX),
    "JSON is nested too deeply": ("xl", b'{"a":' * 5_000, rules.CONFIG_SYNTAX),
    "no c_info": ("xl", json.dumps({"b_info": GOOD["b_info"]}).encode(), rules.CONFIG_TYPE),
    "no type": ("xl", with_members("c_info", type=None), rules.CONFIG_TYPE),
    "type is a number": ("xl", with_members("c_info", type=1), rules.CONFIG_TYPE),
    "type is unknown": ("xl", with_members("c_info", type="paravirt"), rules.CONFIG_TYPE),
    "type hvm": ("xl", config_json("hvm", memory_kib=KIB), rules.CONFIG_TYPE),
    "type pvh": ("xl", config_json("pvh", memory_kib=KIB), rules.CONFIG_TYPE),
    "b_info of another type": ("xl", with_members("b_info", **{"type.pv": None, "type.hvm": {}}), rules.CONFIG_TYPE),
    "b_info of two types": ("xl", with_members("b_info", **{"type.hvm": {}}), rules.CONFIG_TYPE),
    "b_info of no type": ("xl", with_members("b_info", **{"type.pv": None}), rules.CONFIG_TYPE),
    "uuid is a word": ("xl", with_members("c_info", uuid="mine"), rules.CONFIG_UUID),
    "uuid in braces": ("xl", with_members("c_info", uuid=f"{{{UUID}}}"), rules.CONFIG_UUID),
    "uuid without hyphens": ("xl", with_members("c_info", uuid=UUID.replace("-", "")), rules.CONFIG_UUID),
    "memory is negative": ("xl", with_members("b_info", max_memkb=-4), rules.CONFIG_LIMITS),
    "vcpus is negative": ("xl", with_members("b_info", max_vcpus=-1), rules.CONFIG_LIMITS),
    "vcpus is 2^40": ("xl", with_members("b_info", max_vcpus=1 << 40), rules.CONFIG_LIMITS),
    "xl text: uuid": ("xl text", xl(uuid="'mine'"), rules.CONFIG_UUID),
    "xl text: type hvm": ("xl text", xl(type="'hvm'"), rules.CONFIG_TYPE),
    "xl text: builder hvm": ("xl text", xl(builder="'hvm'"), rules.CONFIG_TYPE),
    "xl text: type unknown": ("xl text", xl(type="'linux'"), rules.CONFIG_TYPE),
    "xl text: memory": ("xl text", xl(memory="lots"), rules.CONFIG_LIMITS),
    "XML is cut": ("libvirt", xml()[:-3], rules.CONFIG_SYNTAX),
    "XML is followed by text": ("libvirt", xml() + b"more", rules.CONFIG_SYNTAX),
    "XML of no domain": ("libvirt", b"<network/>", rules.CONFIG_TYPE),
    "XML: type hvm": ("libvirt", xml(kind="hvm"), rules.CONFIG_TYPE),
    "XML: type xenpvh": ("libvirt", xml(kind="xenpvh"), rules.CONFIG_TYPE),
    "XML: type unknown": ("libvirt", xml(kind="exe"), rules.CONFIG_TYPE),
    "XML: uuid": ("libvirt", xml(uuid="mine"), rules.CONFIG_UUID),
    "XML: memory is a word": ("libvirt", xml(memory="lots"), rules.CONFIG_LIMITS),
    "XML: memory has 5000 digits": ("libvirt", xml(memory="9" * 5000), rules.CONFIG_LIMITS),
    "xenopsd: HVM": ("xenopsd", RECORD.format(type="HVM").encode(), rules.CONFIG_TYPE),
    "xenopsd: PVH": ("xenopsd", RECORD.format(type="PVH").encode(), rules.CONFIG_TYPE),
    "xenopsd: PVinPVH": ("xenopsd", RECORD.format(type="PVinPVH").encode(), rules.CONFIG_TYPE),
}
# libxl takes them for missing, and goes on.
IGNORED: dict[str, tuple[str, bytes]] = {
    "memory is 2^50": ("xl", with_members("b_info", max_memkb=1 << 50)),
    "JSON is followed by text": ("xl", TEXT + b"}"),
    "uuid is a number": ("xl", with_members("c_info", uuid=7)),
    "memory is a word": ("xl", with_members("b_info", max_memkb="lots")),
    "memory is 2^80": ("xl", with_members("b_info", max_memkb=1 << 80)),
    "memory has 5000 digits": ("xl", TEXT.replace(b"%d" % KIB, b"9" * 5000, 1)),
    "memory is a fraction": ("xl", with_members("b_info", max_memkb=1.5)),
    "target is a word": ("xl", with_members("b_info", target_memkb="lots")),
    "vcpus is a word": ("xl", with_members("b_info", max_vcpus="two")),
}
SOUND: dict[str, tuple[str, bytes]] = {
    "JSON": ("xl", TEXT),
    "JSON, then NUL and anything": ("xl", TEXT + b"\0rest"),
    "of two members the first": ("xl", TEXT.replace(b'"max_vcpus": 1', b'"max_vcpus": 1, "max_vcpus": 0.5')),
    "memory is 0, but not its target": ("xl", with_members("b_info", max_memkb=0)),
    "no vcpus": ("xl", with_members("b_info", max_vcpus=0)),
    "no uuid": ("xl", with_members("c_info", uuid=None)),
    "uuid of zeros": ("xl", with_members("c_info", uuid="0" * 8 + "-0000-0000-0000-" + "0" * 12)),
    "uuid in upper case": ("xl", with_members("c_info", uuid=UUID.upper())),
    "xl text": ("xl text", xl(uuid=f"'{UUID}'", type="'pv'", vcpus="0x1", maxmem="01")),
    "XML": ("libvirt", xml()),
    "XML: type xen, uuid without hyphens": ("libvirt", xml(uuid=UUID.replace("-", ""), kind="xen")),
    "xenopsd": ("xenopsd", CONFIG_SEXP),
    "xenopsd: PV": ("xenopsd", RECORD.format(type="PV").encode()),
}


def with_config(domain: Domain, envelope: str, config: bytes) -> Stream:
    """The domain with that configuration; "xl text" is xl's envelope without its flag for JSON."""
    end = b"" if envelope == "xenopsd" else b"\0"
    stream = domain.to_stream(envelope.partition(" ")[0], config=config + end)
    if envelope == "xl text":
        stream.patch("xl header", 36, b"\2")
    return stream
