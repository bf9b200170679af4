"""The forms of p2m that a kernel on ModelHost can be asked to publish, by their names."""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.errors import RequestError
from xenpv.memory.anchors import MARKED_TREE_LEVELS, ROOTED_TREE_LEVELS, P2MForm


@dataclass(frozen=True, slots=True)
class Published:
    """What a kernel publishes: a linear list, a tree, both of them or neither (docs/explanation/p2m.md).

    ``levels`` are those of the tree that the kernel has, its leaves counted. ``hidden``: it shows the first three of
    them. ``set_up``: a kernel with neither says "look elsewhere" (all ones), not "not set up yet" (0).
    """

    name: str
    linear: bool = False
    tree: P2MForm | None = None
    levels: int = 3
    hidden: bool = False
    set_up: bool = True


FORMS = {
    form.name: form
    for form in (
        Published("linear", linear=True),
        Published("both", linear=True, tree=P2MForm.TREE),
        Published("tree3", tree=P2MForm.TREE),
        Published("tree4hidden", tree=P2MForm.TREE, levels=4, hidden=True),
        Published("marked", tree=P2MForm.MARKED, levels=MARKED_TREE_LEVELS),
        *(Published(f"rooted{levels}", tree=P2MForm.ROOTED, levels=levels) for levels in ROOTED_TREE_LEVELS),
        Published("none", set_up=False),
        Published("invalid"),
    )
}


def parse_form(name: str) -> Published:
    """The form of that name. RequestError, which lists them all, for any other."""
    if name not in FORMS:
        raise RequestError(f"{name!r} is no form of p2m; these are: {', '.join(FORMS)}")
    return FORMS[name]
