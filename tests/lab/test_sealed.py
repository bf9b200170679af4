"""Stock ``xl restore`` takes sealed files, and xenpv in dom0 refuses those that changed."""

from __future__ import annotations

import lab
from lab import guests


def test_stock_xl_restores_a_sealed_file(host: lab.Host) -> None:
    name = "sealed"
    start = len(host.guest_console(name))
    config = host.write(f"{name}.cfg", guests.litmus_config(name, memory=32, options="p2m=linear"))
    host.run(f"xl create -q {config}").check()
    at = host.wait_for_guest(name, "litmus: up ", after=start)
    host.run(
        "set -e\nhead -c 32 /dev/urandom > $TMPDIR/key; chmod 600 $TMPDIR/key\n"
        f"xenpv save --seal {name} $TMPDIR/sealed\n"
        "xenpv verify --require-seal $TMPDIR/sealed\n"
        "xenpv convert --seal-key $TMPDIR/key $TMPDIR/sealed $TMPDIR/keyed\n"
        "xenpv verify --seal-key $TMPDIR/key $TMPDIR/keyed",
        timeout=240,
    ).check()
    for file in ("sealed", "keyed"):
        host.run(f"xl restore $TMPDIR/{file}", timeout=240).check()
        at = host.wait_for_guest(name, "litmus: pattern ok", after=at)
        host.run(f"xl destroy {name}").check()
    host.run(
        "set -e\ncp $TMPDIR/sealed $TMPDIR/bad\n"
        "printf '\\125\\252\\125' | dd of=$TMPDIR/bad bs=1 seek=5000000 conv=notrunc status=none\n"
        "! xenpv verify -q $TMPDIR/bad\n! xenpv restore $TMPDIR/bad\nrm -f $TMPDIR/bad $TMPDIR/sealed $TMPDIR/keyed",
        timeout=240,
    ).check()
