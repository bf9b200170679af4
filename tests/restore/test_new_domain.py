"""Name, uuid, vcpus and memory of a restored domain: a stream's words are checked before the host hears them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.restoring import restore_error, restore_stream
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from xenpv.errors import RequestError
from xenpv.host.model.host import ModelHost
from xenpv.restore.new_domain import OfferedDomain

UUID = "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab"
OTHER = "00000000-0000-0000-0000-0000000000ff"
NAMES = {
    "empty": "",
    "digits": "17",
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "long": "x" * 256,
    "long in utf-8": "ü" * 128,
}
OFFERED = OfferedDomain(UUID, vcpus=2, max_pages=400)


def stream(vcpus: int = 2, **members: Any) -> bytes:
    """A saved domain with these members of c_info and b_info in its configuration."""
    config = json.loads(config_json(vcpus=vcpus, memory_kib=96 * 4))
    for part in ("c_info", "b_info"):
        config[part] |= {key: value for key, value in members.items() if key in config[part]}
    return bytes(pv_domain(vcpus=vcpus).to_stream("xl", config=json.dumps(config).encode() + b"\0"))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("by", ["stream", "caller"])
def test_restore_domain_name_that_no_domain_gets_raises(name: str, by: str) -> None:
    """The same names as `xenpv build --name` refuses; xl takes digits for a domid."""
    error = restore_error(stream(name=name)) if by == "stream" else restore_error(stream(), name=name)
    assert isinstance(error, RequestError)


def test_restore_domain_bad_name_in_stream_gives_way_to_the_callers() -> None:
    host, restored = restore_stream(stream(name="17"), name="web")
    assert host.info(restored.domid).name == "web"


@pytest.mark.parametrize("written", [UUID, UUID.upper()], ids=["same", "in upper case"])
def test_restore_domain_uuid_of_another_domain_raises(written: str) -> None:
    host = ModelHost(128 << 20, seed=3)
    host.create(8, max_pages=1, name="first", uuid=UUID)
    assert isinstance(restore_error(stream(uuid=written), host), RequestError)


def test_restore_domain_new_uuid_runs_beside_the_saved_domain() -> None:
    host, first = restore_stream(stream())
    host, second = restore_stream(stream(), host, name="second", new_uuid=True)
    uuids = {host.info(restored.domid).uuid for restored in (first, second)}
    assert len(uuids) == 2
    assert UUID in uuids


def test_restore_domain_offered_gets_what_was_offered_and_not_what_the_stream_says() -> None:
    host, restored = restore_stream(stream(max_memkb=1 << 30, target_memkb=1 << 30, max_vcpus=100), offered=OFFERED)
    info = host.info(restored.domid)
    assert (info.uuid, info.max_vcpu, info.max_pages) == (UUID, 1, 400)


@pytest.mark.parametrize("offered", [OTHER, None], ids=["other", "none"])
def test_restore_domain_uuid_that_was_not_offered_raises(offered: str | None) -> None:
    assert isinstance(restore_error(stream(), offered=replace(OFFERED, uuid=offered)), RequestError)


def test_restore_domain_without_uuid_gets_the_offered_one() -> None:
    host, restored = restore_stream(bytes(pv_domain(vcpus=2).to_stream("libxl")), name="web", offered=OFFERED)
    assert host.info(restored.domid).uuid == UUID


def test_restore_domain_more_pages_than_offered_raises() -> None:
    error = restore_error(stream(), offered=replace(OFFERED, max_pages=90))
    assert isinstance(error, RequestError)
    assert error.available == 90
