"""The forms of p2m that the model's kernel can publish, by name."""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.errors import RequestError
from xenpv.memory.p2m_anchors import MARKED_TREE_LEVELS, ROOTED_TREE_LEVELS, P2MForm


@dataclass(frozen=True, slots=True)
class PublishedForm:
    """The p2m forms that a kernel publishes: linear list, tree, both or neither.

    Attributes:
        name: The name of the form.
        linear: Whether it publishes a linear list.
        tree: The form of the tree that it publishes; None: no tree.
        levels: Levels of the kernel's own tree, including the leaves.
        hidden: Whether it publishes only the first three levels of its tree.
        set_up: If it publishes neither: whether its anchor is all ones ("look elsewhere"), not 0 ("not set up yet").
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
        PublishedForm("linear", linear=True),
        PublishedForm("both", linear=True, tree=P2MForm.TREE),
        PublishedForm("tree3", tree=P2MForm.TREE),
        PublishedForm("tree4hidden", tree=P2MForm.TREE, levels=4, hidden=True),
        PublishedForm("marked", tree=P2MForm.MARKED, levels=MARKED_TREE_LEVELS),
        *(PublishedForm(f"rooted{levels}", tree=P2MForm.ROOTED, levels=levels) for levels in ROOTED_TREE_LEVELS),
        PublishedForm("none", set_up=False),
        PublishedForm("invalid"),
    )
}


def parse_form(name: str) -> PublishedForm:
    """Return the form with this name.

    RequestError, which lists all forms, if there is none.
    """
    if name not in FORMS:
        raise RequestError(f"{name!r} is not a form of p2m; use one of {', '.join(FORMS)}")
    return FORMS[name]
