"""Records what libxl and the stock save helper say to each other, on real Xen in the lab.

    python -m tests.vectors.conversations            all versions (two minutes: three boots)
    python -m tests.vectors.conversations 4.17

A program between the two writes down the arguments and both directions. helper-VERSION.json holds the conversation of
each command in COMMANDS: ``arguments``, ``said`` by the helper and ``heard`` by it in hex, its exit ``status``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lab
from lab import guests

HERE = Path(__file__).parent
BETWEEN = """#!/usr/bin/python3
import json, os, subprocess, sys, threading
descriptors = [int(text) for text in sys.argv[2:4] if int(text) >= 0]
helper = subprocess.Popen([os.environ["STOCK"], *sys.argv[1:]], stdin=-1, stdout=-1, pass_fds=descriptors)
said, heard = bytearray(), bytearray()
def pass_on(source, target, keep):
    while data := os.read(source, 65536):
        keep += data
        try:
            os.write(target, data)
        except OSError:
            break
threading.Thread(target=pass_on, args=(0, helper.stdin.fileno(), heard), daemon=True).start()
pass_on(helper.stdout.fileno(), 1, said)
status = helper.wait()
mode = sys.argv[1].removeprefix("--").removesuffix("-domain")
with open(f"{os.environ['KEEP']}.{mode}", "w") as file:
    json.dump({"arguments": sys.argv[1:], "status": status, "said": said.hex(), "heard": heard.hex()}, file)
sys.exit(status if status >= 0 else 255)
"""
# Of a litmus guest; in this order.
COMMANDS = {
    "save -c": "xl save -c litmus /tmp/saved",
    "save": "xl save litmus /tmp/saved",
    "restore": "xl restore /tmp/saved",
    "save to a full disk": "xl save litmus /tmp/small/saved",
    "migrate": "xl migrate -s '' litmus 'xl migrate-receive'",
    "restore, cut off": "head -c 300000 /tmp/saved > /tmp/cut; xl destroy litmus; xl restore /tmp/cut",
    "save, refused by the guest": "xl save refuses /tmp/saved",
}


def record(host: lab.Host) -> dict[str, dict[str, object]]:
    """By command and direction, "migrate save" and "migrate restore": what was recorded."""
    host.write("between", BETWEEN)
    host.write("litmus.cfg", guests.litmus_config("litmus", memory=8))
    host.write("refuses.cfg", guests.litmus_config("refuses", memory=8, options="suspend=refuse"))
    lines = [
        "cp /share/between /tmp/between; chmod +x /tmp/between; mkdir /tmp/small",
        "mount -t tmpfs -o size=1m none /tmp/small; xl create -q /share/litmus.cfg; xl create -q /share/refuses.cfg",
        "export STOCK=$(ls /usr/lib/xen-*/bin/libxl-save-helper) LIBXL_SAVE_HELPER=/tmp/between; sleep 2",
    ]
    lines += [f"export KEEP=$PWD/{number}\n{command}\nsleep 1" for number, command in enumerate(COMMANDS.values())]
    result = host.run("\n".join(lines), timeout=240)
    recorded = {}
    for number, name in enumerate(COMMANDS):
        for path in sorted(result.outputs.glob(f"{number}.*")):
            recorded[f"{name} ({path.suffix[1:]})"] = json.loads(path.read_text())
    return recorded


def main() -> None:
    """Record the versions that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xen", nargs="*", help="versions of Xen (default: all)")
    for xen in parser.parse_args().xen or [version.xen for version in lab.SUPPORTED]:
        with lab.Host(xen) as host:
            recorded = record(host)
        (HERE / f"helper-{xen}.json").write_text(json.dumps(recorded, indent=1) + "\n")
        print(f"{xen}: {', '.join(recorded)}")


if __name__ == "__main__":
    main()
