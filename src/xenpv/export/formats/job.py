"""ExportJob: facts about the domain that formats need, each read at most once."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from xenpv.abi.declare import Width
from xenpv.errors import GuestError
from xenpv.export.formats.content import populated_runs
from xenpv.export.formats.identity import IdentityTree
from xenpv.frames import PFNS_PER_SCAN, PageType
from xenpv.memory.registers import Registers
from xenpv.memory.vmcoreinfo import find_vmcoreinfo, vmcoreinfo_value
from xenpv.runs import Runs
from xenpv.source.domain import Domain

UTSNAME_FIELD = 65  # bytes
UTSNAME_SIZE = 6 * UTSNAME_FIELD  # Linux's struct new_utsname: sysname, nodename, release, version, machine, domainname


class ExportJob:
    """One export of one domain.

    Attributes:
        domain: The domain.
        seekable: Whether the output can seek, so that it takes a Patch.
        remarks: Sentences that the reader of the file should know.
    """

    def __init__(self, domain: Domain, *, seekable: bool) -> None:
        self.domain = domain
        self.seekable = seekable
        self.remarks: list[str] = []

    @cached_property
    def pages(self) -> Runs:
        """The pages that the domain has."""
        return readable_pages(self.domain)

    @cached_property
    def blank_pages(self) -> Runs:
        """The pages of zeros that the stream has without content."""
        pieces = (piece[piece.type == PageType.XALLOC].merged() for piece in self.domain.extents())
        return Runs.empty() if self.domain.saved is None else Runs.concatenate(pieces).merged()

    @cached_property
    def registers(self) -> dict[int, Registers | None]:
        """The registers of each vcpu, None for those that are not known."""
        registers = {vcpu: self.domain.registers(vcpu) for vcpu in self.domain.vcpus}
        if not any(registers.values()):
            self.remarks.append("no vcpu's registers are known")
        return registers

    @cached_property
    def vmcoreinfo(self) -> bytes | None:
        """The text of VMCOREINFO, looked for in all of the memory; None if there is none."""
        return self.checked_vmcoreinfo(find_vmcoreinfo(self.domain))

    def checked_vmcoreinfo(self, text: bytes | None) -> bytes | None:
        """Return the text of VMCOREINFO; add a remark if there is none."""
        if text is None:
            self.remarks.append("no VMCOREINFO in its memory: the guest is no Linux, or none that debuggers know")
        return text

    @cached_property
    def identity(self) -> IdentityTree | None:
        """The p2m that crash needs for a 64-bit PV guest; None for other guests."""
        return None if self.domain.hvm or self.domain.width == 4 else IdentityTree.for_pages(self.pages)

    @cached_property
    def utsname(self) -> bytes:
        """The guest's struct new_utsname.

        If it cannot be read, a made-up one, and a remark.
        """
        text = self.vmcoreinfo or b""
        try:
            init_uts_ns = int(vmcoreinfo_value(text, "SYMBOL(init_uts_ns)") or "", 16)
            offset = int(vmcoreinfo_value(text, "OFFSET(uts_namespace.name)") or "")
        except ValueError:
            if text:  # that there is none is a remark already
                self.remarks.append(
                    "VMCOREINFO does not tell where the kernel's utsname is: the file has a made-up one"
                )
            return _made_up_utsname(text, self.domain.width)
        try:
            return self.domain.memory.read_virtual(init_uts_ns + offset, UTSNAME_SIZE)
        except GuestError as e:
            self.remarks.append(f"the kernel's utsname cannot be read, the file has a made-up one: {e}")
            return _made_up_utsname(text, self.domain.width)


def _made_up_utsname(text: bytes, width: Width) -> bytes:
    """Return a struct new_utsname that readers accept.

    Its release is the one that VMCOREINFO names.
    """
    release = vmcoreinfo_value(text, "OSRELEASE") or "unknown"
    machine = "x86_64" if width == 8 else "i686"
    names = ["Linux" if text else "unknown", "unknown", release, "unknown", machine]
    return b"".join(name.encode()[: UTSNAME_FIELD - 1].ljust(UTSNAME_FIELD, b"\0") for name in names)


def readable_pages(domain: Domain) -> Runs:
    """Return the pages that a domain has.

    Of a file that was cut off, those before its end.
    """
    pages = populated_runs(domain.extents())
    if domain.error is None:
        return pages
    masks = [domain.has_content(pfns) for pfns in pages.batches(PFNS_PER_SCAN)]
    return pages.where(np.concatenate([*masks, np.empty(0, np.bool_)]))
