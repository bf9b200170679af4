"""Config from JSON of libxl, XML of libvirt, xl's text, and from damaged text."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.memory_limit import peak_memory_below
from tests.support.writers.envelopes import CONFIG_SEXP, config_json
from xenpv.source.config import Config
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import CONFIG_MAX, Envelope, Kind, Section
from xenpv.stream.events import SectionHeader

UUID = "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab"


def parse(data: bytes, style: str) -> Config:
    config = Config.from_contents(Contents(envelope=Envelope(Kind.XL, 0, 48, data, style)))
    assert config is not None
    assert config.format == style
    return config


def facts(config: Config) -> tuple[str | int | None, ...]:
    return (config.name, config.uuid, config.type, config.max_memkb, config.target_memkb, config.max_vcpus)


NOTHING = (None,) * 6


def test_config_without_envelope_or_text_is_none() -> None:
    assert Config.from_contents(Contents()) is None
    assert Config.from_contents(Contents(envelope=Envelope(Kind.LIBXL, 0, 0))) is None
    assert Config.from_contents(Contents(envelope=Envelope(Kind.XL, 0, 48, b"", "json"))) is None


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_config_gives_names_and_limits() -> None:
    config = parse(config_json(name="Gast", vcpus=3, memory_kib=98304) + b"\0", "json")
    assert facts(config) == ("Gast", UUID, "pv", 98304, 98304, 3)
    assert json.loads(config.text)["c_info"]["name"] == "Gast"


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"null", b"17", b'"text"', b'{"c_info": []}', b'{"c_info": 3, "b_info": "x"}', b"\xff\xfe\0",
     b"[" * 100_000, b'{"c_info": {"name": 7, "uuid": null, "type": ["pv"]}}',
     b'{"b_info": {"max_memkb": "1", "max_vcpus": true, "target_memkb": 1.5}}'],
)  # fmt: skip
def test_json_config_without_members_gives_text_only(data: bytes) -> None:
    assert facts(parse(data, "json")) == NOTHING


def test_json_config_with_huge_numbers_gives_text_only() -> None:
    assert facts(parse(b'{"b_info": {"max_memkb": %d}}' % (1 << 100), "json")) == NOTHING
    assert facts(parse(b'{"b_info": {"max_memkb": ' + b"9" * 10_000 + b"}}", "json")) == NOTHING


# --- XML -------------------------------------------------------------------------------------------------------------

XML = b"""<domain type='xen'>
  <name>guest</name><uuid>%s</uuid>
  <memory unit='MiB'>512</memory><currentMemory unit='KiB'>131072</currentMemory>
  <vcpu placement='static'>4</vcpu>
</domain>
""" % UUID.encode()


def test_xml_config_gives_names_and_limits() -> None:
    assert facts(parse(XML, "xml")) == ("guest", UUID, "xen", 512 * 1024, 131072, 4)


def test_xml_config_inside_another_element_is_found() -> None:
    assert parse(b"<status>" + XML + b"</status>", "xml").name == "guest"
    assert facts(parse(b"<status/>", "xml")) == NOTHING


@pytest.mark.parametrize(
    ("unit", "kib"),
    [("b", 1), ("bytes", 1), ("KB", 1000), ("k", 1024), ("KiB", 1024), ("M", 1 << 20), ("MiB", 1 << 20), ("G", 1 << 30),
     ("GiB", 1 << 30), ("MB", 10**6), ("GB", 10**9), ("T", 1 << 40), ("TiB", 1 << 40), ("TB", 10**12)],
)  # fmt: skip
def test_xml_config_memory_in_any_unit_is_in_kib(unit: str, kib: int) -> None:
    """https://libvirt.org/formatdomain.html#memory-allocation"""
    text = f"<domain><memory unit='{unit}'>1024</memory></domain>"
    assert parse(text.encode(), "xml").max_memkb == kib


def test_xml_config_memory_without_unit_is_in_kib() -> None:
    assert parse(b"<domain><memory>4096</memory></domain>", "xml").max_memkb == 4096


BOMB = (
    b'<!DOCTYPE a [<!ENTITY x0 "ha">'
    + b"".join(b'<!ENTITY x%d "%s">' % (i, b"&x%d;" % (i - 1) * 10) for i in range(1, 30))
    + b"]><domain><name>&x29;</name></domain>"
)


@pytest.mark.parametrize(
    "data",
    [b"<domain>", b"<domain></nonsense>", b"not xml", b"<domain><name>\xff</name>",
     b"<domain><memory>many</memory></domain>", b"<domain><memory unit='acre'>1</memory></domain>",
     "<domain><memory>\u00b2</memory></domain>".encode(), b"<domain><vcpu>-1</vcpu></domain>",
     b'<!DOCTYPE d [<!ENTITY e "harmless">]><domain><name>&e;</name></domain>',
     b'<!DOCTYPE domain SYSTEM "file:///etc/passwd"><domain/>', BOMB,
     b'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]><domain><name>&e;</name></domain>',
     b"<a>" * 50_000],
    ids=lambda data: data[:30],
)  # fmt: skip
def test_xml_config_without_elements_gives_text_only(data: bytes) -> None:
    """Entities could read files or blow up memory: they are refused, and the text stays text."""
    start = time.process_time()
    config = parse(data, "xml")
    assert facts(config) == NOTHING
    assert config.text == data.decode("utf-8", "replace")
    assert time.process_time() - start < 1


def test_xml_config_with_doctype_in_another_encoding_gives_text_only() -> None:
    """What is refused is looked for in the text that the parser gets, so no encoding hides it."""
    data = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE d [<!ENTITY e "hidden">]><domain><name>&e;</name></domain>'
    assert parse(data.encode("utf-16"), "xml").name is None


# --- xl's own text ---------------------------------------------------------------------------------------------------


def test_xl_config_gives_names_and_limits() -> None:
    text = b"""# a comment
name = "guest"
 uuid='%s'
type = "pv"
memory = 96
maxmem=128 # in MiB
vcpus = 2
maxvcpus = 4
disk = [ 'phy:/dev/x,xvda,w' ]
""" % UUID.encode()
    assert facts(parse(text, "xl")) == ("guest", UUID, "pv", 128 * 1024, 96 * 1024, 4)


def test_xl_config_without_maximum_uses_memory_and_vcpus() -> None:
    config = parse(b"name='a'\nmemory=96\nvcpus=3\n", "xl")
    assert (config.max_memkb, config.target_memkb, config.max_vcpus) == (96 * 1024, 96 * 1024, 3)


@pytest.mark.parametrize(
    "data",
    [b"\0", b"name", b"name =", b"memory = lots", b"= 5", b"\xff\xff", b"x" * 1_000_000, b"name" + b" " * 200_000],
)  # fmt: skip
def test_xl_config_without_lines_gives_text_only(data: bytes) -> None:
    start = time.process_time()
    assert facts(parse(data, "xl")) == NOTHING
    assert time.process_time() - start < 2


# --- others ----------------------------------------------------------------------------------------------------------


def test_xenopsd_config_gives_text_only() -> None:
    contents = Contents(envelope=Envelope(Kind.XENOPSD, 0, 15))
    contents.sections.append(SectionHeader(15, Section.XENOPS, len(CONFIG_SEXP), CONFIG_SEXP))
    config = Config.from_contents(contents)
    assert config is not None
    assert (config.format, config.text) == ("sexp", CONFIG_SEXP.decode())
    assert facts(config) == NOTHING


@pytest.mark.parametrize(
    "filler", ["name =" + " " * 40, "name=x" + " " * 40 + "\n", "\n \t", "name = '", "name = ' \""]
)
def test_xl_config_of_a_mebibyte_of_blanks_is_looked_at_once(filler: str) -> None:
    """20 kB of blanks took 12.5 s: each was tried as the beginning of the value's end."""
    text = (filler * (CONFIG_MAX // len(filler)))[:CONFIG_MAX].encode()
    start = time.process_time()
    with peak_memory_below(64 << 20):
        parse(text, "xl")
    assert time.process_time() - start < 2  # the bound for a MiB of hostile input; a square would take hours


def test_xl_config_last_line_of_a_key_counts() -> None:
    """libxlu_cfg.c xlu__cfg_set_store() puts a setting before the earlier ones, where the first that fits is found."""
    assert parse(b"name = 'old'\nname = 'new' # of today\n", "xl").name == "new"


@pytest.mark.parametrize(
    ("filler", "style"),
    [("<a/>", "xml"), ("<a b='c'/>", "xml"), ("[],", "json"), ('{"a":1},', "json"), ("(a b)", "sexp")],
)
def test_config_of_a_mebibyte_takes_bounded_memory(filler: str, style: str) -> None:
    """14 MB of XML took 636 MiB: a configuration has at most a MiB, which takes at most 64."""
    body = filler * ((CONFIG_MAX - 100) // len(filler))
    text = {"xml": f"<domain>{body}</domain>", "json": f'{{"a": [{body}0]}}', "sexp": f"({body})"}[style]
    with peak_memory_below(64 << 20):
        parse(text.encode(), style)
