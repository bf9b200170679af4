"""xl save, restore and migrate on real Xen, with xenpv-save-helper in the place of libxl's own.

The oracle for what is in a domain's memory is litmus, which checks its pattern after each resume. Stock
libxl-save-helper reads what ours has written, and writes what ours reads.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lab
from lab import guests
from tests.support.lab.guest import BEATS, LIVE, ONE_VERSION, OURS, STOCK, Guest, State, boot, fails, run, start
from xenpv.verify.stream import verify

# By which forms the guest publishes its p2m: those that stock tools save, and others.
FORMS = ("linear spread=2G", "tree spread=2G", "marked", "rooted levels=4", "rooted levels=6")


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("form", [*(pytest.param(form, marks=pytest.mark.deep) for form in ("tree", "linear")), "both"])
def test_litmus_in_each_form(host: lab.Host, form: str) -> None:
    """Saved and restored by ours; by ours, then stock's restore; by stock, then our restore."""
    guest = boot(host, "litmus", f"p2m={form}", vcpus=2)
    there_and_back(guest)
    run(host, f"xl save litmus /tmp/saved && {OURS} xl restore /tmp/saved")
    guest.lives("new domain")


@ONE_VERSION
@pytest.mark.parametrize("options", [*(pytest.param(form, marks=pytest.mark.deep) for form in FORMS[:-1]), FORMS[-1]])
def test_litmus_in_other_forms(host: lab.Host, options: str) -> None:
    """What stock tools do not save, or slowly, they do restore."""
    there_and_back(boot(host, "litmus", f"p2m={options}", vcpus=2))


def there_and_back(guest: Guest) -> None:
    """Saved by ours twice, restored by ours and by stock; its file passes verify."""
    host = guest.host
    result = host.run(f"{OURS} xl save litmus /tmp/saved && {OURS} xl restore /tmp/saved && mv /tmp/saved .").check()
    guest.lives("new domain")
    report = verify(str(result.outputs / "saved"))
    assert [str(finding) for finding in report.findings] == []
    run(host, f"{OURS} xl save litmus /tmp/saved && xl restore /tmp/saved")
    guest.lives("new domain")


@pytest.mark.deep
@ONE_VERSION
def test_what_xl_prints_is_ours(host: lab.Host) -> None:
    boot(host, "litmus", "p2m=both")
    said = run(host, f"{OURS} xl save litmus /tmp/saved")
    assert re.search(r"xenpv: progress: Pages: \d+/\d+ +100%", said), said
    assert re.search(r"xenpv: info: dom\d+ \(litmus\): 4096 pages, \d+ bytes written", said), said
    said = run(host, f"{OURS} xl restore /tmp/saved")
    assert re.search(r"xenpv: info: dom\d+: 4096 pages, \d+ bytes read", said), said
    assert "xc:" not in said


@pytest.mark.deep_elsewhere
def test_a_debian_guest(host: lab.Host) -> None:
    name = "debian"
    start(host, name, guests.config(name), guests.UP)
    for saver, restorer in ((OURS, OURS), (OURS, STOCK), (STOCK, OURS)):
        run(host, f"{saver} xl save {name} /tmp/saved && {restorer} xl restore /tmp/saved && rm /tmp/saved")
        Guest.expected(host, name).beats(guests.BEAT)


@pytest.mark.deep
def test_save_that_leaves_it_running_or_paused(host: lab.Host) -> None:
    guest = boot(host, "litmus", "p2m=both")
    run(host, f"{OURS} xl save -c litmus /tmp/saved")
    guest.wait("pattern ok")
    guest.wait(BEATS)
    run(host, f"{OURS} xl save -p litmus /tmp/saved")
    assert re.search(r"^litmus +\d+ +\d+ +1 +--p---", run(host, "xl list"), re.MULTILINE)
    run(host, "xl unpause litmus")
    guest.wait("pattern ok")
    guest.wait(BEATS)
    run(host, f"xl destroy litmus; {OURS} xl restore -p /tmp/saved")
    assert re.search(r"^litmus +\d+ +\d+ +1 +--p---", run(host, "xl list"), re.MULTILINE)
    run(host, "xl unpause litmus")
    guest.lives("new domain")


# --- from an older Xen to a newer one --------------------------------------------------------------------------------

_from_older: dict[str, Path] = {}  # by "Xen, whose helper": a file that was written there


@pytest.mark.deep
def test_files_of_an_older_xen(host: lab.Host, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What 4.14 wrote, with ours and with stock's, is restored by ours on 4.14 and all newer ones."""
    keep = tmp_path_factory.mktemp(f"helper-{host.xen}")
    for helper, name in ((OURS, "ours"), (STOCK, "stock")):
        boot(host, "litmus", "p2m=both")
        result = host.run(f"{helper} xl save litmus /tmp/saved && mv /tmp/saved .").check()
        _from_older[f"{host.xen}, {name}"] = (result.outputs / "saved").rename(keep / name)
    for path in _from_older.values():
        saved = host.put(path, "older.save")
        guest = Guest.expected(host, "litmus")
        run(host, f"{OURS} xl restore {saved}")
        guest.lives("new domain")
        run(host, "xl destroy litmus")
    guest = Guest.expected(host, "litmus")
    if "4.14, ours" in _from_older:
        run(host, f"xl restore {host.put(_from_older['4.14, ours'], 'older.save')}")
        guest.lives("new domain")


# --- migration -------------------------------------------------------------------------------------------------------

BOTH = ["ours to ours", "ours to stock", "stock to ours"]
# xl's receiving side as a child of the sending one: two helpers, on one Xen.
MIGRATE = "xl migrate -s '' litmus '{receiver} xl migrate-receive'"


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize(
    ("sender", "receiver"), [(OURS, OURS), pytest.param(OURS, STOCK, marks=pytest.mark.deep), (STOCK, OURS)], ids=BOTH
)
def test_migration(host: lab.Host, sender: str, receiver: str) -> None:
    guest = boot(host, "litmus", "p2m=both dirty=200", memory=32)
    command = f"{sender} {MIGRATE.format(receiver=f'env {receiver}')}"
    if host.xen not in LIVE:
        said = fails(host, command)
        assert "Migration failed" in said
        guest.wait(BEATS)
        if sender == STOCK:
            return
        assert "xenpv: error: set XENPV_PRECOPY=no to suspend the domain before its memory is sent" in said, said
        assert re.search(r"xenpv: error: .*CONFIG_SHADOW_PAGING", said), said
        command = f"XENPV_PRECOPY=no {command}"
    arrived = Guest.expected(host, "litmus--incoming")  # what its console is called
    said = run(host, command)
    assert "Migration successful." in said
    arrived.lives("new domain")
    assert len(re.findall("^litmus", run(host, "xl list"), re.MULTILINE)) == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.deep
@ONE_VERSION
def test_a_guest_that_refuses_to_suspend(host: lab.Host) -> None:
    before = State.of(host)
    guest = boot(host, "refuses", "p2m=both suspend=refuse")
    said = fails(host, f"{OURS} xl save refuses /tmp/saved")
    assert re.search(r"xenpv: error: dom\d+ \(refuses\) has not suspended: it runs", said), said
    assert "did not respond to suspend request" in said
    guest.beats()
    before.is_again(host)


@pytest.mark.deep_elsewhere
def test_a_full_disk(host: lab.Host) -> None:
    before = State.of(host)
    guest = boot(host, "litmus", "p2m=both")
    run(host, "mkdir -p /tmp/small; mountpoint -q /tmp/small || mount -t tmpfs -o size=1m none /tmp/small")
    said = fails(host, f"{OURS} xl save litmus /tmp/small/saved")
    assert "xenpv: error: the stream: No space left on device" in said
    guest.wait("pattern ok")
    guest.wait(BEATS)
    run(host, f"rm /tmp/small/saved; {OURS} xl save litmus /tmp/saved && {OURS} xl restore /tmp/saved")
    guest.lives("new domain")
    before.is_again(host)


@pytest.mark.deep
@ONE_VERSION
def test_a_file_system_that_takes_no_foreign_pages(host: lab.Host) -> None:
    """Stock's save to 9p dies of EFAULT."""
    guest = boot(host, "litmus", "p2m=both")
    run(
        host, f"{OURS} xl save litmus /share/direct.save && {OURS} xl restore /share/direct.save; rm /share/direct.save"
    )
    guest.lives("new domain")
    assert "Bad address" in fails(host, "xl save litmus /share/direct.save")
    guest.wait("pattern ok")


@pytest.mark.deep_elsewhere
@ONE_VERSION
def test_a_stream_that_is_cut_off(host: lab.Host) -> None:
    boot(host, "litmus", "p2m=both")
    run(host, f"{OURS} xl save litmus /tmp/saved")
    before = State.of(host)
    size = int(run(host, "stat -c %s /tmp/saved"))
    for at in (2_000, size // 2, size - 10_000):
        said = fails(host, f"head -c {at} /tmp/saved > /tmp/cut; {OURS} xl restore /tmp/cut")
        assert re.search(r"xenpv: error: .*the stream ends|xenpv: error: .*(at 0x[0-9a-f]+)", said), said
        assert "cannot (re-)build domain" in said
    before.is_again(host)


@pytest.mark.deep_elsewhere
@ONE_VERSION
def test_a_bit_flipped_in_the_stream(host: lab.Host) -> None:
    boot(host, "litmus", "p2m=both")
    run(host, f"{OURS} xl save litmus /tmp/saved")
    before = State.of(host)
    script = "import sys; f = open('/tmp/bad', 'r+b'); f.seek(int(sys.argv[1])); f.write(b'\\xff' * 8)"
    for at in (4_000, 6_000):
        said = fails(host, f'cp /tmp/saved /tmp/bad; python3 -c "{script}" {at}; {OURS} xl restore /tmp/bad')
        assert "xenpv: error: " in said
    before.is_again(host)


@pytest.mark.deep
def test_less_memory_than_the_domain_had(host: lab.Host) -> None:
    boot(host, "litmus", "p2m=both", memory=32)
    run(host, f"{OURS} xl save litmus /tmp/saved")
    before = State.of(host)
    config = host.write("small.cfg", guests.litmus_config("litmus", memory=16))
    said = fails(host, f"{OURS} xl restore {config} /tmp/saved")
    assert re.search(r"xenpv: error: dom\d+.*memory", said), said
    before.is_again(host)


# A save that has come to a halt in the middle: nobody reads on. The brackets are for pgrep not to find this shell.
HALTED = """
rm -f /tmp/pipe /tmp/half; mkfifo /tmp/pipe
(head -c 3000000 > /dev/null; touch /tmp/half; exec sleep 300) < /tmp/pipe & reader=$!
{ours} xl save litmus /tmp/pipe 2> said & xl=$!
until [ -e /tmp/half ]; do sleep .2; done; sleep 1
helper=$(pgrep -f 'save_helper.program --[s]ave')
{act}
wait $xl; echo "status $?"
for i in $(seq 100); do pgrep -f 'save_helper.program --[s]ave' > /dev/null || break; sleep .1; done
kill $reader; cat said; ! pgrep -f 'save_helper.program --[s]ave'
"""


def halted(host: lab.Host, act: str, words: str) -> None:
    before = State.of(host)
    guest = boot(host, "litmus", "p2m=both")
    said = run(host, HALTED.format(ours=OURS, act=act))
    assert "status 0" not in said
    assert words in said, said
    guest.wait("litmus: resume")
    guest.wait("pattern ok")
    guest.wait(BEATS)
    before.is_again(host)


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("xl_too", [False, True], ids=["helper", "xl"])
def test_a_save_that_is_killed(host: lab.Host, xl_too: bool) -> None:
    """xl lets the guest run on when the helper dies, the helper does when xl dies."""
    halted(host, "kill -KILL $xl; sleep 1; kill $reader" if xl_too else "kill -KILL $helper",
           "" if xl_too else "save/restore helper")  # fmt: skip


@pytest.mark.deep
@ONE_VERSION
@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("kill -TERM $helper", "xenpv: error: the stream: stopped by SIGTERM"),
        ("kill $reader", "xenpv: error: the stream: Broken pipe"),
        ("kill -INT $xl; kill -INT $helper", ""),  # as a terminal does
    ],
    ids=["helper asked to end", "nobody reads", "interrupted"],
)
def test_a_save_that_does_not_come_to_its_end(host: lab.Host, act: str, words: str) -> None:
    halted(host, act, words)


@pytest.mark.deep
@ONE_VERSION
def test_a_guest_that_stock_leaves_suspended(host: lab.Host) -> None:
    """When xl is killed, libxl-save-helper ends, and nobody lets the guest run on."""
    boot(host, "litmus", "p2m=both")
    host.run(HALTED.format(ours="", act="kill -KILL $xl; sleep 1; kill $reader"))
    assert re.search(r"^litmus +\d+ +\d+ +1 +---ss-", run(host, "sleep 2; xl list"), re.MULTILINE)


@pytest.mark.deep_elsewhere
def test_a_restore_that_is_killed(host: lab.Host) -> None:
    boot(host, "litmus", "p2m=both")
    run(host, f"{OURS} xl save litmus /tmp/saved")
    before = State.of(host)
    said = run(
        host,
        f"""
        rm -f /tmp/pipe /tmp/half; mkfifo /tmp/pipe
        (head -c 3000000 /tmp/saved; touch /tmp/half; exec sleep 300) > /tmp/pipe & writer=$!
        {OURS} xl restore /tmp/pipe 2> said & xl=$!
        until [ -e /tmp/half ]; do sleep .2; done; sleep 1
        pkill -KILL -f 'save_helper.program --[r]estore'
        wait $xl; echo "status $?"; kill $writer; cat said
        """,
    )
    assert "status 0" not in said
    assert "save/restore helper" in said
    before.is_again(host)


@pytest.mark.deep
@ONE_VERSION
def test_what_is_not_supported_is_refused_in_words(host: lab.Host) -> None:
    guest = boot(host, "litmus", "p2m=both")
    said = fails(host, f"{OURS} xl remus -Fbnd litmus nowhere", timeout=60)
    assert "xenpv: error: Remus is not supported" in said, said
    guest.wait(BEATS)
