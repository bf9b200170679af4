"""Domains handed over between two model hosts: they arrive and run, or they stay; refusals, and the last word lost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.kernel_guest import SOME_FORMS
from tests.support.migration import CONFIG, MEMORY, NAME, PAGES, UUID, Move, linked
from xenpv.errors import GuestError, HostError, Malformed, OutOfOrder, RequestError, StreamError, Unsupported
from xenpv.frames import DomId
from xenpv.host.domain_names import AWAY, INCOMING
from xenpv.host.model.host import ModelHost
from xenpv.migrate.channel import MigrationChannel, OutcomeUnknown
from xenpv.migrate.handover import RECEIVER, SENDER, Message, Offer, encode
from xenpv.migrate.receiver import receive_domain, refuse
from xenpv.migrate.sender import Owner, Settlement, send_domain, settle, take_back
from xenpv.migrate.transport import Link
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.source_domain import RollbackError, SourceState

FORMS = [name for width, name in SOME_FORMS if width == 8]


def refusal(op: str, no: int = errno.EIO) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise HostError(f"{op}: no", op=op, errno=no)

    return call


@pytest.mark.parametrize("live", [None, PrecopyPolicy()], ids=["suspended", "live"])
@pytest.mark.parametrize("form", FORMS)
def test_migrate_domain_runs_on_receiver(form: str, live: PrecopyPolicy | None) -> None:
    move = Move.ready(form)
    ended = move.start(live=live)
    assert (ended.here, ended.there) == (None, None)
    assert ended.given is not None
    assert ended.taken is not None
    assert (ended.given.domid, ended.taken.running, ended.taken.name) == (ended.taken.domid, True, NAME)
    assert 0 < ended.given.downtime < 20
    assert move.is_gone_here()
    assert move.there() is not None
    assert [what for what, _ in ended.told] == ["connected", "accepted", "sent", "ready", "running"]
    assert ended.heard("sent")["pages"] >= PAGES


def test_migrate_busy_guest_arrives_as_it_stopped() -> None:
    move = Move.ready()
    live = move.live

    def passes() -> None:
        move.counter += 1
        some = move.pfns[: len(move.pfns) // 2]
        move.guest.do("write_pattern", move.pfns if move.counter == 8 else some, move.counter)
        move.guest.do("write_pattern", move.pfns[len(some) :], move.counter)
        live()

    move.source.set_time_slice(move.guest.domid, passes)
    ended = move.start(live=PrecopyPolicy(max_iterations=4))
    assert ended.here is None
    assert move.counter > 8
    assert move.there() is not None
    assert ended.given is not None
    assert ended.given.summary.pages > PAGES + 3 * len(move.pfns), "pages were sent more than once"


def test_migrate_paused_stays_paused_on_receiver() -> None:
    move = Move.ready()
    ended = move.start(paused=True)
    assert ended.taken is not None
    assert not ended.taken.running
    assert move.is_gone_here()
    (info,) = [info for info in move.target.domains() if info.domid]
    assert (info.name, info.paused) == (NAME, True)
    move.target.unpause(info.domid)
    assert move.there() is not None


def test_migrate_suspended_domain_runs_on_receiver() -> None:
    move = Move.ready()
    move.guest.do("suspend")
    assert move.start(live=PrecopyPolicy()).here is None
    assert move.there() is not None


# --- refused before anything is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (
            lambda move: move.target.create(8, max_pages=1, name=NAME),
            f"of this name or uuid already: dom1 ({NAME})",
        ),
        (lambda move: move.target.create(8, max_pages=1, name=NAME + INCOMING), "already: dom1"),
        (lambda move: move.fill(1200), "it needs 5 MiB, and 4 MiB are free"),
    ],
    ids=["name", "incoming name", "memory"],
)
def test_migrate_domain_that_does_not_fit_is_refused_before_sending(prepare: Callable[[Move], Any], said: str) -> None:
    move = Move.ready()
    prepare(move)
    before = len(move.target.domains()), move.target.free_pages()
    ended = move.start()
    assert isinstance(ended.here, RequestError)
    assert said in str(ended.here)
    assert str(ended.here) == f"there: {ended.there}"
    assert ended.sent is not None
    assert ended.sent.written < 1000
    assert ended.heard("kept")["rollback"].state is SourceState.RUNNING
    assert not move.suspended, "it was not even asked"
    assert move.runs_here()
    assert before == (len(move.target.domains()), move.target.free_pages())


def test_migrate_uuid_on_receiver_is_refused() -> None:
    move = Move.ready()
    move.target.create(8, max_pages=1, name="other", uuid=UUID)
    assert "already: dom1 (other)" in str(move.start().here)
    assert move.runs_here()


def test_migrate_receiver_out_of_memory_keeps_domain_on_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    hog = move.fill(700)
    monkeypatch.setattr(move.target, "free_pages", lambda: 1 << 30)
    ended = move.start()
    assert isinstance(ended.here, RequestError), "the receiver's own words"
    assert str(ended.there) in str(ended.here)
    assert move.runs_here()
    assert [info.domid for info in move.target.domains()] == [0, hog]


# --- guests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [None, PrecopyPolicy()], ids=["suspended", "live"])
def test_migrate_unresponsive_guest_keeps_running_on_sender(live: PrecopyPolicy | None) -> None:
    move = Move.ready()
    move.source.set_time_slice(move.guest.domid, lambda: None)
    ended = move.start(suspend_timeout=0.05, live=live)
    assert isinstance(ended.here, GuestError)
    assert move.runs_here()
    assert move.nothing_there()
    assert isinstance(ended.there, StreamError | OSError)


@pytest.mark.parametrize("live", [None, PrecopyPolicy()], ids=["suspended", "live"])
def test_migrate_guest_that_crashes_is_left_shut_down(live: PrecopyPolicy | None) -> None:
    move = Move.ready()
    move.source.set_time_slice(move.guest.domid, lambda: move.source.hypervisor.shutdown(move.guest.domid, 3))
    ended = move.start(live=live)
    assert isinstance(ended.here, GuestError)
    assert ended.heard("kept")["rollback"].state is SourceState.SHUT_DOWN
    assert move.source.info(move.guest.domid).name == NAME
    assert move.nothing_there()


def test_migrate_domain_with_devices_is_refused_before_sending() -> None:
    move = Move.ready()
    move.source.store.write(f"/local/domain/{move.guest.domid}/device/vbd/51712/state", b"4")
    ended = move.start()
    assert isinstance(ended.here, RequestError)
    assert "vbd 51712" in str(ended.here)
    assert not move.suspended
    assert move.nothing_there()
    move.source.store.remove(f"/local/domain/{move.guest.domid}/device/vbd")
    assert move.runs_here()


def test_migrate_paused_domain_is_refused() -> None:
    move = Move.ready()
    move.source.pause(move.guest.domid)
    ended = move.start()
    assert isinstance(ended.here, RequestError)
    assert "paused" in str(ended.here)
    assert not move.suspended
    move.source.unpause(move.guest.domid)
    assert move.runs_here()


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["rename", "unpause", "introduce", "pin_tables", "set_vcpu_context"])
def test_migrate_receiver_fails_to_start_rolls_back_on_sender(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    monkeypatch.setattr(move.target, call, refusal(call))
    ended = move.start()
    assert isinstance(ended.here, RequestError)
    assert "no" in str(ended.here)
    assert isinstance(ended.there, HostError)
    assert move.runs_here()
    assert move.nothing_there()


def test_migrate_receiver_fails_to_start_and_destroy_is_outcome_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    monkeypatch.setattr(move.target, "unpause", refusal("unpause"))
    monkeypatch.setattr(move.target, "destroy", refusal("destroy"))
    ended = move.start()
    assert isinstance(ended.here, OutcomeUnknown)
    assert all(reason in str(ended.here) for reason in ("unpause: no", "destroy: no"))
    assert isinstance(ended.there, OutcomeUnknown)
    assert move.waits_here()


def test_migrate_sender_fails_to_rename_keeps_domain_on_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    names: list[str] = []

    def rename(_domid: int, name: str) -> None:
        names.append(name)
        if name.endswith(AWAY):
            raise HostError("rename: no", op="rename")

    monkeypatch.setattr(move.source, "rename", rename)
    assert str(move.start().here) == "rename: no"
    assert names == [NAME + AWAY, NAME]
    assert move.runs_here()
    assert move.nothing_there()


def test_migrate_sender_fails_to_destroy_raises_host_error(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    monkeypatch.setattr(move.source, "destroy", refusal("destroy"))
    ended = move.start()
    assert isinstance(ended.here, HostError)
    assert ended.here.op == "migrate"
    assert "destroy: no" in str(ended.here)
    assert move.waits_here(), "and does not run"
    assert move.there() is not None


def test_migrate_failed_rollback_raises_rollback_error(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    monkeypatch.setattr(move.source, "resume", refusal("resume"))
    monkeypatch.setattr(move.target, "unpause", refusal("unpause"))
    ended = move.start()
    rollback = ended.heard("kept")["rollback"]
    assert (rollback.state, rollback.error.op) == (None, "resume")
    assert isinstance(ended.here, RollbackError)
    assert ended.here.rollback == rollback
    assert move.nothing_there()


@pytest.mark.parametrize("where", ["before", "suspended"])
def test_migrate_interrupted_keeps_domain_on_sender(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if where == "before":
        move.source.set_time_slice(move.guest.domid, interrupted)
    else:
        monkeypatch.setattr(move.source, "vcpu_state", interrupted)
    ended = move.start()
    assert isinstance(ended.here, KeyboardInterrupt)
    monkeypatch.undo()
    move.source.set_time_slice(move.guest.domid, move.live)
    assert move.runs_here()
    assert move.nothing_there()


# --- the last word lost ----------------------------------------------------------------------------------------------


def undecided(*, arrives: bool) -> Move:
    """A domain that was given away, and of which the sender has not heard since."""
    first = Move.ready().start()
    assert first.sent is not None
    assert first.answered is not None
    move = Move.ready()
    # What follows READY does not get out; or COMMIT does not, though it counts as sent.
    behind = first.answered.message_ends[-2], first.sent.message_ends[-2]
    ended = move.start(back=behind[0]) if arrives else move.start(out=behind[1], lost=True)
    assert isinstance(ended.here, OutcomeUnknown)
    assert f"xenpv migrate --settle {move.guest.domid} there" in str(ended.here)
    assert move.waits_here()
    return move


def settled(move: Move) -> tuple[Settlement | BaseException, BaseException | None]:
    """What asking the other host comes to, and how that saw it."""
    failed: list[BaseException] = []
    with linked(Link, 20.0) as (here, there):

        def answer() -> None:
            try:
                assert receive_domain(move.target, there) is None
            except BaseException as e:  # it is looked at
                failed.append(e)
            there.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            outcome: Settlement | BaseException = settle(move.source, move.guest.domid, here)
        except Exception as e:  # it is looked at
            outcome = e
        here.close()
        thread.join(20)
    return outcome, failed[0] if failed else None


def resumed_here(move: Move) -> Settlement:
    return Settlement(Owner.SENDER, f"dom{move.guest.domid} ({NAME})", move.guest.domid)


def test_settle_domain_runs_on_receiver_destroys_the_copy() -> None:
    move = undecided(arrives=True)
    there = move.there()
    assert there is not None
    outcome, _ = settled(move)
    assert outcome == Settlement(Owner.RECEIVER, f"dom{move.guest.domid} ({NAME}{AWAY})", there.domid)
    assert move.is_gone_here()


def test_settle_domain_unknown_to_receiver_is_outcome_unknown() -> None:
    move = undecided(arrives=False)
    assert move.nothing_there()
    outcome, there = settled(move)
    assert there is None, "the receiver answered, and nothing failed there"
    assert isinstance(outcome, OutcomeUnknown)
    assert f"xenpv migrate --take-back {move.guest.domid}" in str(outcome)  # the command to type
    assert move.waits_here()
    assert take_back(move.source, move.guest.domid) == resumed_here(move)
    assert move.runs_here()


def test_settle_incoming_domain_on_receiver_resumes_on_sender() -> None:
    """Its incoming domain is there, paused, and nobody will start it: asking ends it, and the sender's goes on."""
    move = undecided(arrives=False)
    move.target.create(8, max_pages=1, name=NAME + INCOMING, uuid=UUID)
    outcome, _ = settled(move)
    assert outcome == resumed_here(move)
    assert move.runs_here()
    assert move.nothing_there()


def test_settle_receiver_fails_to_destroy_is_outcome_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    move = undecided(arrives=False)
    move.target.create(8, max_pages=1, name=NAME + INCOMING, uuid=UUID)
    monkeypatch.setattr(move.target, "destroy", refusal("destroy"))
    outcome, there = settled(move)
    assert isinstance(outcome, OutcomeUnknown)
    assert str(there) in str(outcome), "the receiver's reason"
    assert isinstance(there, HostError)
    assert move.waits_here()


def test_migrate_committed_domain_is_refused() -> None:
    move = undecided(arrives=True)
    assert f"xenpv migrate --settle {move.guest.domid}" in str(move.start().here)
    assert move.waits_here()


def test_settle_running_domain_is_refused() -> None:
    move = Move.ready()
    for call in (lambda: take_back(move.source, move.guest.domid), lambda: _raise(settled(move)[0])):
        with pytest.raises(RequestError, match=rf"dom{move.guest.domid} "):
            call()
    assert move.runs_here()


def _raise(error: object) -> None:
    assert isinstance(error, BaseException)
    raise error


# --- others than us --------------------------------------------------------------------------------------------------


def test_migrate_receiver_of_another_version_is_unsupported() -> None:
    move = Move.ready()
    with linked(Link, 5.0) as (here, there):
        MigrationChannel(there, RECEIVER).send(Message.HELLO, protocol=[2, 3], xen="9.0", xenpv="9")
        with pytest.raises(Unsupported, match=r"\[2, 3\]"):
            send_domain(move.source, move.guest.domid, here, config=CONFIG)
    assert move.runs_here()


def test_migrate_peer_that_is_no_receiver_is_unsupported() -> None:
    move = Move.ready()
    with linked(Link, 5.0) as (here, there):
        there.write([b"bash: xenpv: command not found\n"])
        with pytest.raises(Unsupported, match="bash: xe"):
            send_domain(move.source, move.guest.domid, here, config=CONFIG)
    assert move.runs_here()


def test_migrate_ready_during_the_stream_is_out_of_order() -> None:
    move = Move.ready()
    with linked(Link, 5.0) as (here, there):
        channel = MigrationChannel(there, RECEIVER)
        channel.send(Message.HELLO, protocol=[1, 1])
        there.write([encode(Message.ACCEPT, {}), encode(Message.READY, {})])
        with pytest.raises(OutOfOrder):
            send_domain(move.source, move.guest.domid, here, config=CONFIG)
    assert move.runs_here()


def test_receive_invalid_offer_is_malformed() -> None:
    target = ModelHost(MEMORY)
    with linked(Link, 5.0) as (here, there):
        channel = MigrationChannel(here, SENDER)
        failed: list[BaseException] = []

        def receive() -> None:
            try:
                receive_domain(target, there)
            except StreamError as e:
                failed.append(e)

        thread = threading.Thread(target=receive)
        thread.start()
        channel.receive()
        channel.send(Message.OFFER, pages=-1)
        with pytest.raises(RequestError, match="protocol is None"):
            channel.receive()
        here.close()
        thread.join(20)
    assert failed
    assert len(target.domains()) == 1


def test_migrate_sender_cannot_rename_at_all_says_that_the_domain_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest is resumed whatever its name: an operator must not take it for suspended."""
    move = Move.ready()

    def rename(_domid: int, _name: str) -> None:
        raise HostError("rename: no", op="rename")

    monkeypatch.setattr(move.source, "rename", rename)
    error = move.start().here
    assert isinstance(error, RollbackError)
    assert error.rollback.state is SourceState.RUNNING
    assert str(error.rollback.error) == "rename: no"
    assert not move.source.info(move.guest.domid).is_stopped


# --- which domain is meant -------------------------------------------------------------------------------------------

OTHER_UUID = "00000000-0000-0000-0000-0000000000ff"


@pytest.mark.parametrize("incoming", [False, True], ids=["runs", "incoming"])
def test_settle_other_domain_of_that_name_is_no_answer_and_stays(incoming: bool) -> None:
    """A new domain has the name by now, or another one of that name arrives: the uuid says that it is not ours."""
    move = undecided(arrives=False)
    other = move.target.create(8, max_pages=1, name=NAME + INCOMING if incoming else NAME, uuid=OTHER_UUID)
    outcome, there = settled(move)
    assert there is None
    assert isinstance(outcome, OutcomeUnknown)
    assert move.waits_here()
    assert move.target.info(other).uuid == OTHER_UUID


def test_settle_domain_renamed_on_receiver_is_found_by_its_uuid() -> None:
    move = undecided(arrives=True)
    there = move.there()
    assert there is not None
    move.target.rename(there.domid, "renamed")
    outcome, _ = settled(move)
    assert isinstance(outcome, Settlement)
    assert (outcome.owner, outcome.domid) == (Owner.RECEIVER, there.domid)


def test_settle_incoming_domain_that_runs_is_kept_by_both() -> None:
    """An operator has unpaused it: it must be destroyed as little as the sender's copy, before somebody has looked."""
    move = undecided(arrives=False)
    by_hand = move.target.create(8, max_pages=1, name=NAME + INCOMING, uuid=UUID)
    move.target.unpause(by_hand)
    outcome, _ = settled(move)
    assert isinstance(outcome, OutcomeUnknown)
    assert move.waits_here()
    assert move.target.info(by_hand).domid == by_hand


@pytest.mark.parametrize(
    "query",
    [{"name": ["web"], "uuid": None}, {"name": "", "uuid": None}, {"name": "web", "uuid": "web"}, {"name": 7}],
    ids=["name is a list", "name is empty", "uuid is a name", "name is a number"],
)
def test_receive_query_for_no_possible_domain_is_malformed(query: dict[str, Any]) -> None:
    move = Move.ready()
    incoming = move.target.create(8, max_pages=1, name=INCOMING)
    with linked(Link, 20.0) as (here, there):
        here.write([encode(Message.QUERY, query)])
        with pytest.raises(Malformed) as e:
            receive_domain(move.target, there)
    assert e.value.record == "QUERY"
    assert move.target.info(incoming).name == INCOMING


def test_receive_query_in_upper_case_finds_the_domain() -> None:
    move = Move.ready()
    domid = move.target.create(8, max_pages=1, name="web", uuid=UUID)
    heard: list[dict[str, Any]] = []
    with linked(Link, 20.0) as (here, there):
        here.write([encode(Message.QUERY, {"name": "web", "uuid": UUID.upper()})])
        receive_domain(move.target, there, on_event=lambda _event, **details: heard.append(details))
    assert heard == [{"name": "web", "here": [domid], "destroyed": []}]


def test_migrate_domain_without_name_is_refused_before_sending() -> None:
    """Nothing could mark its copies: neither as incoming, nor as committed."""
    move = Move.ready()
    move.source.rename(move.guest.domid, "")
    info = move.source.info(move.guest.domid)
    assert not info.name
    ended = move.start()
    assert isinstance(ended.here, RequestError)
    assert ended.sent is not None
    assert ended.sent.written == 0
    assert not move.source.info(move.guest.domid).shutdown
    assert move.nothing_there()


def test_receive_offer_without_name_is_refused() -> None:
    host = ModelHost(MEMORY)
    offer = Offer(1, None, UUID, 8, 1, 8, 8, 8, [], "4.17")
    with pytest.raises(RequestError):
        refuse(host, offer)
    refuse(host, replace(offer, name="web"))
    for name in ("17", "x" * 255):  # no room for its temporary name
        with pytest.raises(RequestError):
            refuse(host, replace(offer, name=name, forms=[]))


def test_migrate_stream_of_another_domain_is_refused() -> None:
    """The stream's configuration names a uuid that the OFFER did not: the receiver has not checked that one."""
    move = Move.ready()
    move.source.hypervisor.domains[move.guest.domid].uuid = OTHER_UUID
    ended = move.start()
    assert isinstance(ended.there, RequestError)
    assert move.runs_here()
    assert move.nothing_there()


# --- whatever fails on the way back ----------------------------------------------------------------------------------


def test_take_back_guest_that_ends_at_once_was_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    move = undecided(arrives=False)
    outcome, resume = resumed_here(move), move.source.resume

    def resume_and_end(domid: DomId) -> None:
        resume(domid)
        move.source.destroy(domid)  # as xl does with a guest that powers off

    monkeypatch.setattr(move.source, "resume", resume_and_end)
    monkeypatch.setattr(move.source, "rename", lambda _domid, _name: None)
    assert take_back(move.source, move.guest.domid) == outcome


def test_take_back_resume_fails_keeps_the_name_that_shows_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    move = undecided(arrives=False)
    monkeypatch.setattr(move.source, "resume", refusal("resume"))
    with pytest.raises(HostError):
        take_back(move.source, move.guest.domid)
    assert move.waits_here()


def test_settle_after_sender_ended_before_it_destroyed_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that is killed after RUNNING leaves what one leaves that cannot destroy its copy."""
    move = Move.ready()
    with monkeypatch.context() as patch:
        patch.setattr(move.source, "destroy", refusal("destroy"))
        move.start()
    assert move.waits_here()
    assert move.there() is not None
    outcome, _ = settled(move)
    assert isinstance(outcome, Settlement)
    assert outcome.owner is Owner.RECEIVER
    assert move.is_gone_here()


def test_receive_failure_counts_and_not_that_of_the_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's error reaches both sides; that the copy could not be destroyed is a note of it."""
    move = Move.ready()
    monkeypatch.setattr(move.target, "introduce", refusal("introduce"))
    monkeypatch.setattr(move.target, "destroy", refusal("destroy"))
    ended = move.start()
    assert isinstance(ended.there, HostError)
    assert ended.there.op == "introduce"
    [note] = ended.there.__notes__
    assert "destroy: no" in note
    assert move.runs_here()


@pytest.mark.parametrize("domid", ["\x1b[2J", True, -1, 0, 1 << 40, None])
def test_migrate_domid_that_no_xen_gives_out_is_unknown(domid: object, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    send = MigrationChannel.send

    def lie(channel: MigrationChannel, message: Message, **body: Any) -> None:
        send(channel, message, **(body | ({"domid": domid} if message is Message.RUNNING else {})))

    monkeypatch.setattr(MigrationChannel, "send", lie)
    ended = move.start()
    assert ended.given is not None
    assert ended.given.domid is None
    assert ended.heard("running")["domid"] is None


def test_migrate_words_of_the_peer_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move.ready()
    send = MigrationChannel.send

    def escape(channel: MigrationChannel, message: Message, **body: Any) -> None:
        send(channel, message, **{key: "\x1b[2J" if key in {"xen", "xenpv"} else value for key, value in body.items()})

    monkeypatch.setattr(MigrationChannel, "send", escape)
    ended = move.start()
    assert ended.heard("connected")["xen"] == ended.heard("connected")["xenpv"] == "?[2J"
