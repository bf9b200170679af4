"""Makes the vectors: small real save files, written by stock xl on real Xen in the lab.

    python -m tests.vectors.make            all of them (a few minutes: three boots)
    python -m tests.vectors.make 4.17       those of one version of Xen

Each is compressed with xz, and the command that made it is written into README.md beside it.
"""

from __future__ import annotations

import argparse
import lzma
from dataclasses import dataclass
from pathlib import Path

import lab
from lab import guests

HERE = Path(__file__).parent
DEMO = HERE.parent.parent / "src/xenpv/cli/demo.save.xz"  # the package brings this one along
README = """# Vectors

Real save files of the litmus guest, written by stock `xl save` on real Xen in the lab, compressed with xz. They hold
nothing but litmus and its pattern. `python -m tests.vectors.make` makes them anew.

| file | Xen | made with | bytes unpacked |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One vector: on which Xen, and how litmus was asked to be."""

    xen: str
    form: str
    memory: int
    vcpus: int
    options: str = ""

    @property
    def name(self) -> str:
        return f"litmus-{self.xen}-{self.form}"

    @property
    def path(self) -> Path:
        return HERE / f"{self.name}.save.xz"

    def config(self) -> str:
        options = f"p2m={self.form} {self.options}".strip()
        return guests.litmus_config(self.name, memory=self.memory, vcpus=self.vcpus, options=options)


RECIPES = (
    Recipe("4.14", "both", memory=8, vcpus=1),
    Recipe("4.17", "both", memory=16, vcpus=2),
    Recipe("4.17", "tree", memory=8, vcpus=1),
    Recipe("4.17", "linear", memory=8, vcpus=4),
    Recipe("4.20", "both", memory=8, vcpus=1),
)
FOR_DEMO = RECIPES[1]


def make(host: lab.Host, recipe: Recipe) -> bytes:
    """Start litmus as the recipe says, save it with xl once it runs, and give the file's bytes."""
    config = host.write(f"{recipe.name}.cfg", recipe.config())
    host.run(f"xl create {config}").check()
    host.wait_for_guest(recipe.name, "litmus: heartbeat 1")
    result = host.run(f"xl save {recipe.name} /tmp/saved && mv /tmp/saved .").check()
    return (result.outputs / "saved").read_bytes()


def main() -> None:
    """Make the vectors that were asked for, and the README of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xen", nargs="*", help="versions of Xen (default: all)")
    versions = parser.parse_args().xen or [version.xen for version in lab.SUPPORTED]
    for xen in versions:
        with lab.Host(xen) as host:
            for recipe in (r for r in RECIPES if r.xen == xen):
                data = make(host, recipe)
                packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
                (DEMO if recipe is FOR_DEMO else recipe.path).write_bytes(packed)
                print(f"{recipe.name}: {len(data)} bytes, packed {len(packed)}")
    rows = []
    for recipe in RECIPES:
        path = DEMO if recipe is FOR_DEMO else recipe.path
        size = len(lzma.decompress(path.read_bytes()))
        command = (
            f"memory={recipe.memory} vcpus={recipe.vcpus} cmdline=`{recipe.config().split('cmdline = ')[1].strip()}`"
        )
        rows.append(f"| {path.name} | {recipe.xen} | `xl create` with {command}, `xl save` | {size} |\n")
    (HERE / "README.md").write_text(README + "".join(rows))


if __name__ == "__main__":
    main()
