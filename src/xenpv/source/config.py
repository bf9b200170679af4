"""Config: identity and limits from the configuration in a stream's envelope."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Section

# Libvirt's units of memory in bytes: https://libvirt.org/formatdomain.html#memory-allocation
_UNITS = {"b": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _UNITS |= {_letter: 1 << 10 * _power, f"{_letter}ib": 1 << 10 * _power, f"{_letter}b": 1000**_power}


@dataclass(frozen=True, slots=True)
class Config:
    """The part of a configuration that xenpv uses.

    A member is None if the configuration does not have it.

    Attributes:
        format: "json", "xl", "xml" or "sexp".
        text: All of the configuration.
        name: The domain's name.
        uuid: Its uuid, in lower case; None also for one of zeros only, which stands for none.
        type: Its type, in the words of the format.
        max_memkb: The most memory that it may have, in KiB.
        target_memkb: The memory that it is meant to have, in KiB.
        max_vcpus: The number of its vcpus.
    """

    format: str
    text: str
    name: str | None = None
    uuid: str | None = None
    type: str | None = None
    max_memkb: int | None = None
    target_memkb: int | None = None
    max_vcpus: int | None = None

    @classmethod
    def from_contents(cls, contents: Contents) -> Config | None:
        """Return the configuration in a stream's envelope; None if there is none.

        If it cannot be parsed, only ``format`` and ``text`` are set.
        """
        envelope = contents.envelope
        if envelope is None:
            return None
        data, config_format = envelope.config, envelope.config_format
        for section in contents.sections:
            if section.section is Section.XENOPS:
                data, config_format = section.data, "sexp"
        if not data:
            return None
        text = data.rstrip(b"\0").decode("utf-8", "replace")
        parse = _PARSERS.get(config_format)
        if parse is None:
            return cls(config_format, text)
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError):  # ElementTree.ParseError is a SyntaxError
            return cls(config_format, text)


def boot_source(kernel: str, ramdisk: str | None, cmdline: str) -> dict[str, str]:
    """Return what xl boots again if the domain reboots after an xl restore.

    A kernel from a pipe ("-") is unknown.
    """
    files = {"kernel": kernel, "ramdisk": ramdisk} if kernel != "-" else {}
    boot = {name: os.path.abspath(path) for name, path in files.items() if path}
    boot["cmdline"] = cmdline
    return {name: value.encode(errors="replace").decode() for name, value in boot.items() if value}


def libxl_config(name: str, uuid: str, *, pages: int, vcpus: int, boot: Mapping[str, str] | None = None) -> bytes:
    """Return the JSON configuration of a PV domain without devices.

    It has the form that libxl_domain_config_to_json() writes.

    Args:
        name: The domain's name.
        uuid: Its uuid.
        pages: Its memory in pages.
        vcpus: The number of its vcpus.
        boot: Members of b_info that name kernel, ramdisk and command line.
    """
    kib = pages * 4
    config = {
        "c_info": {"type": "pv", "name": name, "uuid": uuid, "run_hotplug_scripts": "True"},
        "b_info": {
            "max_vcpus": vcpus,
            "avail_vcpus": list(range(vcpus)),
            "max_memkb": kib,
            "target_memkb": kib,
            "video_memkb": 0,
            "type.pv": {},
            **(boot or {}),
        },
        "on_reboot": "restart",
    }
    return json.dumps(config, indent=4).encode()


def _parse_json(text: str) -> Config:
    """Parse what libxl_domain_config_to_json() writes."""
    config = json.loads(text)
    c_info, b_info = _dict_member(config, "c_info"), _dict_member(config, "b_info")
    return Config(
        "json",
        text,
        name=_str_or_none(c_info.get("name")),
        uuid=_uuid_or_none(c_info.get("uuid")),
        type=_str_or_none(c_info.get("type")),
        max_memkb=_int_or_none(b_info.get("max_memkb")),
        target_memkb=_int_or_none(b_info.get("target_memkb")),
        max_vcpus=_int_or_none(b_info.get("max_vcpus")),
    )


def _dict_member(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _str_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _uuid_or_none(value: object) -> str | None:
    try:
        uuid = UUID(value) if isinstance(value, str) else UUID(int=0)
    except ValueError:
        return None
    return str(uuid) if uuid.int else None


def _int_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parse_xml(text: str) -> Config:
    """Parse libvirt's domain XML."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("a domain's XML defines no entities")
    from xml.etree import ElementTree as ET  # noqa: PLC0415  only libvirt configures in XML

    root = ET.fromstring(text)  # noqa: S314  entities were refused above
    domain = root if root.tag == "domain" else root.find(".//domain")
    if domain is None:
        return Config("xml", text)

    def kib(tag: str) -> int | None:
        element = domain.find(tag)
        unit = None if element is None else _UNITS.get(element.get("unit", "KiB").lower())
        if element is None or unit is None or not (element.text or "").strip().isdecimal():
            return None
        return int((element.text or "").strip()) * unit >> 10

    vcpus = (domain.findtext("vcpu") or "").strip()
    return Config(
        "xml",
        text,
        name=domain.findtext("name"),
        uuid=_uuid_or_none(domain.findtext("uuid")),
        type=domain.get("type"),
        max_memkb=kib("memory"),
        target_memkb=kib("currentMemory"),
        max_vcpus=int(vcpus) if vcpus.isdecimal() else None,
    )


def _parse_xl(text: str) -> Config:
    """Parse the plain ``key = value`` lines of xl's text format.

    Files before Xen 4.5 carry it.
    """

    def value(key: str) -> str | None:
        match = re.search(rf"^\s*{key}\s*=\s*[\"']?([^\"'\n#]+?)[\"']?\s*(?:#.*)?$", text, re.MULTILINE)
        return match.group(1) if match else None

    def number(key: str, scale: int = 1) -> int | None:
        digits = value(key)
        return int(digits) * scale if digits and digits.isdecimal() else None

    memory = number("memory", 1024)
    maximum = number("maxmem", 1024)
    return Config(
        "xl",
        text,
        name=value("name"),
        uuid=_uuid_or_none(value("uuid")),
        type=value("type"),
        max_memkb=memory if maximum is None else maximum,
        target_memkb=memory,
        max_vcpus=number("maxvcpus") or number("vcpus"),
    )


_PARSERS = {"json": _parse_json, "xml": _parse_xml, "xl": _parse_xl}
