"""Config: identity and limits from the configuration in a stream's envelope."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from xenpv.findings import Rule
from xenpv.stream import rules
from xenpv.stream.envelope import Envelope, Section
from xenpv.stream.events import SectionHeader
from xenpv.stream.record_order import Guest
from xenpv.text import printable

if TYPE_CHECKING:
    from xenpv.stream.contents import Contents

# Libvirt's units of memory in bytes: https://libvirt.org/formatdomain.html#memory-allocation
_UNITS = {"b": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _UNITS |= {_letter: 1 << 10 * _power, f"{_letter}ib": 1 << 10 * _power, f"{_letter}b": 1000**_power}


_INTEGER_DIGITS = 20  # of 64 bits, with a sign
_MAX_KIB = 1 << 42  # x86 has physical addresses of 52 bits
_MAX_VCPUS = 8192  # xen.git:xen/include/public/domctl.h createdomain; Xen itself allows a PV domain that many
_DEFAULT_KIB = 32 << 10  # xen.git:tools/libs/light/libxl_create.c libxl__domain_build_info_setdefault()
_GUESTS = {"pv": Guest.PV, "hvm": Guest.HVM, "pvh": Guest.HVM}  # libxl's types; a PVH domain's stream is an HVM one

Problem = tuple[Rule, str]
"""A rule that a configuration breaks, and how."""


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
        guest: The type of stream that goes with its type.
        max_memkb: The most memory that it may have, in KiB.
        target_memkb: The memory that it is meant to have, in KiB.
        max_vcpus: The number of its vcpus.
        problems: What keeps a toolstack from using it.
    """

    format: str
    text: str
    name: str | None = None
    uuid: str | None = None
    type: str | None = None
    guest: Guest | None = None
    max_memkb: int | None = None
    target_memkb: int | None = None
    max_vcpus: int | None = None
    problems: tuple[Problem, ...] = ()

    @classmethod
    def from_contents(cls, contents: Contents) -> Config | None:
        """Return the configuration in a stream's envelope, or None."""
        return cls.from_envelope(contents.envelope, contents.sections)

    @classmethod
    def from_envelope(cls, envelope: Envelope | None, sections: Iterable[SectionHeader] = ()) -> Config | None:
        """Return the configuration in an envelope; None if it has none.

        If it cannot be parsed, only ``format``, ``text`` and ``problems`` are set.

        Args:
            envelope: The envelope; None for a bare stream.
            sections: The sections of a xenopsd file.
        """
        if envelope is None:
            return None
        data, config_format = envelope.config, envelope.config_format
        for section in sections:
            if section.section is Section.XENOPS:
                data, config_format = section.data, "sexp"
        if not data:
            return None
        text = data.rstrip(b"\0").decode("utf-8", "replace")
        parse = _PARSERS.get(config_format)
        if parse is None:
            return cls(config_format, text)
        try:
            # Toolstacks take it as a C string.
            members, problems = parse(data.partition(b"\0")[0].decode("utf-8", "strict"))
        except (ValueError, SyntaxError, RecursionError) as e:  # ElementTree.ParseError is a SyntaxError
            problem = f"the configuration is no {config_format.upper()}: {str(e) or type(e).__name__}"
            return cls(config_format, text, problems=((rules.CONFIG_SYNTAX, printable(problem)),))
        return cls(config_format, text, **members, problems=tuple(problems))

    def iter_problems(self, guest: Guest | None) -> Iterator[Problem]:
        """Yield what keeps a toolstack from restoring a stream with it.

        Args:
            guest: The type of the stream; None if unknown.
        """
        yield from self.problems
        if guest is not None and self.guest is not None and guest is not self.guest:
            yield (
                rules.CONFIG_TYPE,
                f"type {self.type!a:.40} of the configuration is not that of the {guest.name} stream",
            )

    @property
    def populated_memkb(self) -> int | None:
        """The memory that libxl gives a PV domain at restore, in KiB, or None.

        libxl and libvirt take the target, not the maximum.

        Source: xen.git:tools/libs/light/libxl_dom.c libxl__build_pre()
        """
        if self.target_memkb is None and self.max_memkb is None and self.format == "json":
            return _DEFAULT_KIB
        return self.max_memkb if self.target_memkb is None else self.target_memkb


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


_Parsed = tuple[dict[str, Any], list[Problem]]


def _parse_json(text: str) -> _Parsed:
    """Parse what libxl_domain_config_to_json() writes, as libxl parses it."""
    decoder = json.JSONDecoder(
        object_pairs_hook=_first_of_each, parse_int=_libxl_integer, parse_constant=_refuse_constant
    )
    config, end = decoder.raw_decode(text, len(text) - len(text.lstrip()))
    c_info, b_info = _dict_member(config, "c_info"), _dict_member(config, "b_info")
    problems: list[Problem] = []
    if text[end:].strip():
        problems.append((rules.CONFIG_IGNORED, f"{len(text) - end} characters follow the configuration"))
    members = {
        "name": _str_or_none(c_info.get("name")),
        "uuid": _uuid(c_info.get("uuid"), problems, strict=True),
        "type": _str_or_none(c_info.get("type")),
        # libxl restores a domain with any maximum: its target counts.
        "max_memkb": _limit("max_memkb", b_info.get("max_memkb"), _MAX_KIB, problems, too_large=rules.CONFIG_IGNORED)
        or None,
        "target_memkb": _limit("target_memkb", b_info.get("target_memkb"), _MAX_KIB, problems),
        "max_vcpus": _limit("max_vcpus", b_info.get("max_vcpus"), _MAX_VCPUS, problems) or None,  # 0: the default
    }
    members["guest"] = _GUESTS.get(str(members["type"]))
    # The members of one type only follow: an empty object if there are none.
    build_types = [name for name in _GUESTS if isinstance(b_info.get(f"type.{name}"), dict)]
    if members["guest"] is None:
        problem = f"type {c_info['type']!a:.40} in c_info is none" if "type" in c_info else "c_info has no type"
        problems.append((rules.CONFIG_TYPE, problem))
    elif build_types != [members["type"]]:
        problem = f"b_info is of type {' and '.join(build_types) or 'none'}, and c_info of type {members['type']}"
        problems.append((rules.CONFIG_TYPE, problem))
    return members, problems


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two members of one name libxl sees the first."""
    return dict(reversed(pairs))


def _libxl_integer(digits: str) -> int | str:
    """Return a JSON integer; its text if it exceeds 64 bits, as libxl does."""
    if len(digits) > _INTEGER_DIGITS or not -(1 << 63) < int(digits) < (1 << 63) - 1:
        return digits
    return int(digits)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not in JSON")


def _dict_member(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _str_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _uuid(value: object, problems: list[Problem], *, strict: bool) -> str | None:
    """Return a uuid in lower case; None if it is missing, or all zeros.

    Args:
        value: The member of the configuration.
        problems: Gets a problem if the member is no uuid.
        strict: Take only 8-4-4-4-12 digits, as libuuid does.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        problems.append((rules.CONFIG_IGNORED, f"uuid is no text, but {value!a:.40}"))
        return None
    try:
        uuid = UUID(value)
    except ValueError:
        uuid = None
    if uuid is None or (strict and str(uuid) != value.lower()):
        problems.append((rules.CONFIG_UUID, f"{value!a:.80} is no uuid"))
        return None
    return str(uuid) if uuid.int else None


def _limit(
    name: str,
    value: object,
    maximum: int,
    problems: list[Problem],
    *,
    other_kind: Rule = rules.CONFIG_IGNORED,
    too_large: Rule = rules.CONFIG_LIMITS,
) -> int | None:
    """Return a member with a size; None, and a problem, if no domain can have it.

    Args:
        name: The member's name.
        value: Its value; None if it is missing.
        maximum: The largest that a domain can have.
        problems: Gets the problem.
        other_kind: The rule that a value breaks which is no integer.
        too_large: The rule that a value above the maximum breaks.
    """
    if value is None:
        return None
    if type(value) is not int:
        problems.append((other_kind, f"{name} is {value!a:.40}; it is a number up to {maximum}"))
        return None
    if not 0 <= value <= maximum:
        shown = f"{value}" if abs(value) < 1 << 64 else "far too large"
        rule = too_large if value > 0 else rules.CONFIG_LIMITS
        problems.append((rule, f"{name} is {shown}; it is a number up to {maximum}"))
        return None
    return value


def _number(text: str, *, base: int = 10) -> int | str:
    """Return the number in a text; the text if it is none, or too long.

    Args:
        text: The text.
        base: 10, or 0 to take octal and hexadecimal numbers by their prefix, as strtol() does.
    """
    text = text.strip()
    pattern = "[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)" if base == 0 else "[0-9]+"
    if len(text) > _INTEGER_DIGITS or not re.fullmatch(pattern, text):
        return text
    digits = text.lstrip("+-")
    octal = base == 0 and digits[:1] == "0" and digits.isdecimal()
    try:
        return int(text, 8 if octal else base)
    except ValueError:  # 08
        return text


def _to_kib(number: int | str | None, unit: int) -> int | str | None:
    """Return a number of units of so many bytes in KiB; what is no number as it is."""
    return number * unit >> 10 if isinstance(number, int) else number


def _parse_xml(text: str) -> _Parsed:
    """Parse libvirt's domain XML."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("a domain's XML defines no entities")
    from xml.etree import ElementTree as ET  # noqa: PLC0415  only libvirt configures in XML

    root = ET.fromstring(text)  # noqa: S314  entities were refused above
    domain = root if root.tag == "domain" else root.find(".//domain")
    if domain is None:
        return {}, [(rules.CONFIG_TYPE, f"the XML describes no domain, but <{root.tag!a:.40}>")]
    problems: list[Problem] = []

    def kib(tag: str) -> int | None:
        element = domain.find(tag)
        if element is None:
            return None
        unit, number = _UNITS.get(element.get("unit", "KiB").lower()), _number(element.text or "")
        if unit is None:
            problems.append((rules.CONFIG_LIMITS, f"{element.get('unit')!a:.40} is no unit of {tag}"))
            return None
        return _limit(tag, _to_kib(number, unit), _MAX_KIB, problems, other_kind=rules.CONFIG_LIMITS)

    vcpus, os_type = domain.findtext("vcpu"), (domain.findtext("os/type") or "").strip()
    guest = {"linux": Guest.PV, "xen": Guest.PV, "hvm": Guest.HVM, "xenpvh": Guest.HVM}.get(os_type)
    if os_type and guest is None:
        problems.append((rules.CONFIG_TYPE, f"{os_type!a:.40} is no type of a Xen domain"))
    max_vcpus = None if vcpus is None else _number(vcpus)
    members = {
        "name": domain.findtext("name"),
        "uuid": _uuid(domain.findtext("uuid"), problems, strict=False),
        "type": domain.get("type"),
        "guest": guest,
        "max_memkb": kib("memory"),
        "target_memkb": kib("currentMemory"),
        "max_vcpus": _limit("vcpu", max_vcpus, _MAX_VCPUS, problems, other_kind=rules.CONFIG_LIMITS) or None,
    }
    return members, problems


# Each line is looked at once: a pattern that looks for its end again from every blank takes the square of the text.
_XL_LINES = re.compile(r"^[ \t]*(name|uuid|type|builder|memory|maxmem|vcpus|maxvcpus)[ \t]*=[ \t]*(.*)$", re.MULTILINE)


def _xl_value(text: str) -> str:
    """Return the value that a text begins with: a quoted string, or plain text."""
    if text[:1] in {"'", '"'}:
        return text[1:].partition(text[0])[0]
    return text.partition("#")[0].strip().rstrip(";").rstrip()


def _parse_xl(text: str) -> _Parsed:
    """Parse the plain ``key = value`` lines of xl's text format.

    Files before Xen 4.5 carry it. What else the format allows is not checked. The last line for a key counts
    (tools/libs/util/libxlu_cfg.c xlu__cfg_set_store()).
    """
    values = {match[1]: value for match in _XL_LINES.finditer(text) if (value := _xl_value(match[2]))}
    problems: list[Problem] = []

    def number(key: str) -> int | str | None:
        return None if (digits := values.get(key)) is None else _number(digits, base=0)

    def kib(key: str) -> int | None:
        return _limit(key, _to_kib(number(key), 1 << 20), _MAX_KIB, problems, other_kind=rules.CONFIG_LIMITS)

    def count(key: str) -> int | None:
        return _limit(key, number(key), _MAX_VCPUS, problems, other_kind=rules.CONFIG_LIMITS)

    memory, maximum, vcpus = kib("memory"), kib("maxmem"), count("vcpus")
    builder = values.get("builder", "generic")
    type_name = values.get("type") or {"hvm": "hvm", "generic": "pv"}.get(builder, builder)
    if type_name not in _GUESTS:
        problems.append((rules.CONFIG_TYPE, f"{type_name!a:.40} is no type of a Xen domain"))
    members = {
        "name": values.get("name"),
        "uuid": _uuid(values.get("uuid"), problems, strict=True),
        "type": values.get("type"),
        "guest": _GUESTS.get(type_name),
        "max_memkb": maximum or memory or None,
        "target_memkb": memory,
        "max_vcpus": count("maxvcpus") or vcpus or None,
    }
    return members, problems


def _parse_sexp(text: str) -> _Parsed:
    """Return the type in xenopsd's record, whose vm_str is a Vm.t.

    Source: xen-api.git:ocaml/xapi-idl/xen/xenops_interface.ml Vm.builder_info
    """
    match = re.search(r"\(ty ?\((HVM|PVinPVH|PVH|PV)\b", text)
    if match is None:
        return {}, []
    return {"type": match[1], "guest": Guest.PV if match[1] == "PV" else Guest.HVM}, []


_XEND_MEMBERS = re.compile(r"\((name|uuid|memory|maxmem|vcpus) ([^()\s]{1,256})\)")


def _parse_xend(text: str) -> _Parsed:
    """Return what the first members of xend's s-expression say.

    For example (domain (name web) (memory 256) …).
    """
    members = {match[1]: match[2] for match in reversed(list(_XEND_MEMBERS.finditer(text)))}
    problems: list[Problem] = []
    numbers = {key: _number(members[key]) for key in ("memory", "maxmem", "vcpus") if key in members}
    memory, maximum = (
        _limit(key, _to_kib(numbers.get(key), 1 << 20), _MAX_KIB, problems) for key in ("memory", "maxmem")
    )
    guest = "hvm" if "(hvm" in text else "pv"
    return {
        "name": members.get("name"),
        "uuid": _uuid(members.get("uuid"), problems, strict=False),
        "type": guest,
        "guest": _GUESTS[guest],
        "max_memkb": memory if maximum is None else maximum,
        "target_memkb": memory,
        "max_vcpus": _limit("vcpus", numbers.get("vcpus"), _MAX_VCPUS, problems),
    }, problems


_PARSERS: dict[str, Callable[[str], _Parsed]] = {
    "json": _parse_json,
    "xml": _parse_xml,
    "xl": _parse_xl,
    "sexp": _parse_sexp,
    "xend": _parse_xend,
}
