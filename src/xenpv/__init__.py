"""xenpv: Xen PV domains of any memory size, on real Xen and without it.

The names in ``__all__`` are the public API; docs/reference/api.md shows each with an example. All else is private.

Names are loaded at first use (PEP 562), so that ``import xenpv`` takes no longer than Python's own start.

``verify``, ``save`` and five more are functions here, and packages of the same name hold what they do. Python sets the
attribute ``xenpv.save`` to the package whenever a module of that package is imported, which would hide the function.
Therefore the module's class drops exactly those assignments. ``from xenpv.save.save import X`` and ``from xenpv.save
import save`` still work: they find packages in ``sys.modules``. Dotted access from ``xenpv`` on finds the function:
``import xenpv.save.file; xenpv.save.file`` and ``import xenpv.save.save as x`` fail. Say
``from xenpv.save import file``.
"""

import sys
from types import ModuleType

TYPE_CHECKING = False  # type checkers take it for true; importing typing would double the time of this module
if TYPE_CHECKING:
    from xenpv.api import build, convert, migrate, restore, save
    from xenpv.diff.diff import diff
    from xenpv.errors import (
        Fault,
        GuestError,
        HostError,
        ImageError,
        Malformed,
        OutOfOrder,
        RequestError,
        StreamError,
        Truncated,
        Unsupported,
        XenPVError,
    )
    from xenpv.export.export import export
    from xenpv.findings import Finding, Rule
    from xenpv.memory.domain import DomainMemory
    from xenpv.source.domain import Domain
    from xenpv.source.open import open_domain
    from xenpv.stream.reader import Reader
    from xenpv.stream.writer import Writer
    from xenpv.verify.stream import Report, verify

__version__ = "0.1.0"

__all__ = [
    "Domain",
    "DomainMemory",
    "Fault",
    "Finding",
    "GuestError",
    "HostError",
    "ImageError",
    "Malformed",
    "OutOfOrder",
    "Reader",
    "Report",
    "RequestError",
    "Rule",
    "StreamError",
    "Truncated",
    "Unsupported",
    "Writer",
    "XenPVError",
    "build",
    "convert",
    "diff",
    "export",
    "migrate",
    "open_domain",
    "restore",
    "save",
    "verify",
]

_MODULES = {
    "xenpv.api": ("build", "convert", "migrate", "restore", "save"),
    "xenpv.diff.diff": ("diff",),
    "xenpv.export.export": ("export",),
    "xenpv.findings": ("Finding", "Rule"),
    "xenpv.memory.domain": ("DomainMemory",),
    "xenpv.source.domain": ("Domain",),
    "xenpv.source.open": ("open_domain",),
    "xenpv.stream.reader": ("Reader",),
    "xenpv.stream.writer": ("Writer",),
    "xenpv.verify.stream": ("Report", "verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415  loaded with the first name

    value = getattr(import_module(_MODULE_OF.get(name, "xenpv.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package whose public functions keep their names.

    Importing a package of the same name does not replace them.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
