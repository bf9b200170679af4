"""The configuration of a saved domain: what toolstacks refuse, verify, restore and convert refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.configurations import BAD, IGNORED, RECORD, SOUND, TEXT, with_config, with_members, xml
from tests.support.restoring import restore_error, restore_stream
from tests.support.saved_files import verify_file, verify_pipe
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.hvm import hvm_stream
from xenpv.convert.convert import ConvertOptions
from xenpv.convert.file import NotRestorable, convert
from xenpv.errors import StreamError
from xenpv.frames import IS_POPULATED
from xenpv.io.stream_input import Input
from xenpv.stream import rules
from xenpv.stream.envelope import Kind
from xenpv.verify.stream import verify


@pytest.mark.parametrize("name", BAD)
def test_config_that_a_toolstack_refuses_is_refused_by_verify_restore_and_convert(tmp_path: Path, name: str) -> None:
    envelope, config, rule = BAD[name]
    data = bytes(with_config(pv_domain(), envelope, config))
    file, out = tmp_path / "bad.save", tmp_path / "out.save"
    file.write_bytes(data)
    for result in (verify_file(file), verify_pipe(data)):
        assert {finding.rule for finding in result.findings} == {rule}, str(result)
        assert {finding.offset for finding in result.findings} == {0}
    assert [finding.rule for finding in verify(str(file), deep=False).findings] == [rule]
    error = restore_error(data)
    assert isinstance(error, StreamError)
    assert error.rule == rule.name
    source = Input.open(str(file))
    with pytest.raises(NotRestorable) as e:
        convert(source, str(out), ConvertOptions())
    source.close()
    assert {finding.rule for finding in e.value.findings} == {rule}
    assert not out.exists()
    source = Input.open(str(file))
    convert(source, str(out), ConvertOptions(kind=Kind.LIBXC))  # which carries no configuration
    source.close()
    assert verify_file(out).report.ok


@pytest.mark.parametrize("name", SOUND)
def test_config_that_a_toolstack_takes_is_sound(tmp_path: Path, name: str) -> None:
    envelope, config = SOUND[name]
    data = bytes(with_config(pv_domain(), envelope, config))
    file = tmp_path / "good.save"
    file.write_bytes(data)
    result = verify_file(file)
    assert not result.findings, str(result)
    restore_stream(data)


@pytest.mark.parametrize("name", IGNORED)
def test_config_with_members_that_libxl_ignores_has_a_warning(tmp_path: Path, name: str) -> None:
    envelope, config = IGNORED[name]
    data = bytes(with_config(pv_domain(), envelope, config))
    file = tmp_path / "ignored.save"
    file.write_bytes(data)
    result = verify_file(file)
    assert {finding.rule for finding in result.findings} == {rules.CONFIG_IGNORED}, str(result)
    assert result.report.ok
    restore_stream(data)


def test_memory_limit_without_a_number_is_libxls_default() -> None:
    """libxl__domain_build_info_setdefault(): 32 MiB, and 1 MiB of slack."""
    config = with_members("b_info", max_memkb="lots", target_memkb="lots")
    for pages, limited in ((33 * 256, False), (33 * 256 + 1, True)):
        domain = pv_domain(pfns=range(pages))
        populated = sum(bool(IS_POPULATED[page_type]) for page_type in domain.types.values())
        result = verify_pipe(bytes(domain.to_stream(config=config + b"\0")))
        assert ("memory-limit" in result.rules) is (populated > 33 * 256) is limited


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd"])
def test_config_of_a_pv_domain_around_an_hvm_stream_is_refused(tmp_path: Path, envelope: str) -> None:
    config = {"xl": TEXT, "libvirt": xml(), "xenopsd": RECORD.format(type="PV").encode()}[envelope]
    file = tmp_path / "hvm.save"
    file.write_bytes(bytes(hvm_stream(envelope, pages=4, config=config + b"\0" * (envelope != "xenopsd"))))
    for deep in (True, False):
        assert [finding.rule for finding in verify(str(file), deep=deep).findings] == [rules.CONFIG_TYPE]


@pytest.mark.parametrize(("missing", "allowed"), [(256, True), (257, False), (590, False)])
def test_memory_limit_is_the_target_and_not_the_maximum(missing: int, allowed: bool) -> None:
    """libxl__build_pre() calls xc_domain_setmaxmem(target_memkb + 1024)."""
    domain = pv_domain(pfns=range(600))
    pages = sum(bool(IS_POPULATED[page_type]) for page_type in domain.types.values())
    config = json.loads(config_json(memory_kib=4 * pages))
    config["b_info"]["target_memkb"] = 4 * (pages - missing)
    result = verify_pipe(bytes(domain.to_stream(config=json.dumps(config).encode() + b"\0")))
    assert {finding.rule.name for finding in result.findings} == (set() if allowed else {"memory-limit"})
