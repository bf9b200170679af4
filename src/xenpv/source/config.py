"""The domain's configuration as an envelope carries it: who it is and how large it may be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Section

# libvirt's units of memory: https://libvirt.org/formatdomain.html#memory-allocation
_UNITS = {"b": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _UNITS |= {_letter: 1 << 10 * _power, f"{_letter}ib": 1 << 10 * _power, f"{_letter}b": 1000**_power}


@dataclass(frozen=True, slots=True)
class Config:
    """What matters of it here; None for what it does not say. Memory in KiB. ``text`` is all of it."""

    format: str
    text: str
    name: str | None = None
    uuid: str | None = None
    type: str | None = None
    max_memkb: int | None = None
    target_memkb: int | None = None
    max_vcpus: int | None = None


def config_of(contents: Contents) -> Config | None:
    """The configuration of a stream's envelope; None where there is none. What cannot be understood stays text."""
    envelope = contents.envelope
    if envelope is None:
        return None
    data, style = envelope.config, envelope.config_format
    for section in contents.sections:
        if section.section is Section.XENOPS:
            data, style = section.data, "sexp"
    if not data:
        return None
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    try:
        parse = _PARSERS.get(style)
        return parse(text) if parse else Config(style, text)
    except (ValueError, ET.ParseError, RecursionError):
        return Config(style, text)


def as_libxl(name: str, uuid: str, *, pages: int, vcpus: int, boot: Mapping[str, str] | None = None) -> bytes:
    """What xl makes a PV domain without devices by, JSON as libxl_domain_config_to_json() would have it; what is not
    said is its default. ``boot``: members of b_info that say what it boots from.
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


def _json(text: str) -> Config:
    """libxl_domain_config as libxl_domain_config_to_json() writes it."""
    config = json.loads(text)
    c_info, b_info = _dict(config, "c_info"), _dict(config, "b_info")
    return Config(
        "json",
        text,
        name=_str(c_info.get("name")),
        uuid=_str(c_info.get("uuid")),
        type=_str(c_info.get("type")),
        max_memkb=_int(b_info.get("max_memkb")),
        target_memkb=_int(b_info.get("target_memkb")),
        max_vcpus=_int(b_info.get("max_vcpus")),
    )


def _dict(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _str(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _xml(text: str) -> Config:
    """Libvirt's domain XML."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("a domain's XML has no entities of its own")
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
        uuid=domain.findtext("uuid"),
        type=domain.get("type"),
        max_memkb=kib("memory"),
        target_memkb=kib("currentMemory"),
        max_vcpus=int(vcpus) if vcpus.isdecimal() else None,
    )


def _xl(text: str) -> Config:
    """Xl's own text format, as files from before Xen 4.5's JSON have it: only plain ``key = value`` lines."""

    def value(key: str) -> str | None:
        match = re.search(rf"^\s*{key}\s*=\s*[\"']?([^\"'\n#]+?)[\"']?\s*(?:#.*)?$", text, re.MULTILINE)
        return match.group(1) if match else None

    def number(key: str, scale: int = 1) -> int | None:
        found = value(key)
        return int(found) * scale if found and found.isdecimal() else None

    memory = number("memory", 1024)
    maximum = number("maxmem", 1024)
    return Config(
        "xl",
        text,
        name=value("name"),
        uuid=value("uuid"),
        type=value("type"),
        max_memkb=memory if maximum is None else maximum,
        target_memkb=memory,
        max_vcpus=number("maxvcpus") or number("vcpus"),
    )


_PARSERS = {"json": _json, "xml": _xml, "xl": _xl}
