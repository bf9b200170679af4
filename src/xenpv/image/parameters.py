"""Parameters: what a kernel's notes demand of its domain's builder.

They are combined as Xen combines them.

Source: xen.git:xen/common/libelf/libelf-dominfo.c elf_xen_parse_note(), elf_xen_parse_guest_info(),
elf_xen_parse_features(); xen.git:xen/include/public/features.h
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from xenpv.image import notes as elfnote
from xenpv.image.notes import Note, NoteSource, Value

XENFEAT = {
    0: "writable_page_tables",
    1: "writable_descriptor_tables",
    2: "auto_translated_physmap",
    3: "supervisor_mode_kernel",
    4: "pae_pgdir_above_4gb",
    5: "mmu_pt_update_preserve_ad",
    6: "highmem_assist",
    7: "gnttab_map_avail_bits",
    8: "hvm_callback_vector",
    9: "hvm_safe_pvclock",
    10: "hvm_pirqs",
    11: "dom0",
    12: "grant_map_identity",
    13: "memory_op_vnode_supported",
    14: "ARM_SMCCC_supported",
    15: "linux_rsdp_unrestricted",
    16: "not_direct_mapped",
    17: "direct_mapped",
    18: "runstate_phys_area",
    19: "vcpu_time_phys_area",
    20: "dm_msix_all_writes",
}
XENFEAT_AUTO_TRANSLATED = 1 << 2
XENFEAT_DOM0 = 1 << 11
# The names that Xen knows in the FEATURES string. It refuses a kernel that requires ("!") any other.
_BIT_BY_NAME = {name: 1 << bit for bit, name in XENFEAT.items() if bit in {0, 1, 2, 3, 4, 8, 11}}

_UNSET = (1 << 64) - 1  # UNSET_ADDR: no address
_UNSET32 = (1 << 32) - 1


class Pae(StrEnum):
    """The page tables that a 32-bit kernel uses.

    It is NO for 64-bit kernels, which have no such note.
    """

    NO = "no"
    YES = "yes, with its top table below 4 GiB"
    EXTENDED_CR3 = "yes"
    BIMODAL = "bimodal"


@dataclass(frozen=True, slots=True)
class Features:
    """Features as bits of features.h, and names that Xen does not know."""

    supported: int = 0
    required: int = 0
    unknown: tuple[str, ...] = ()
    unknown_required: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the notes say, None or "" by default. Addresses and offsets are in bytes."""

    virt_base: int | None
    entry: int | None
    paddr_offset: int | None
    hypercall_page: int | None
    hv_start_low: int | None
    init_p2m: int | None
    phys32_entry: int | None
    phys32_reloc: tuple[int, ...] | None
    mod_start_pfn: bool
    suspend_cancel: bool
    bsd_symtab: bool
    pae: Pae
    features: Features
    loader: str
    guest_os: str
    guest_version: str
    xen_version: str

    @classmethod
    def from_notes(cls, notes: Iterable[Note], source: NoteSource) -> Parameters:
        """Combine notes. The last of each type counts, but features add up."""
        last: dict[int | None, Value] = {}
        features = Features()
        for note in notes:
            last[note.type] = note.value
            if note.type == elfnote.FEATURES and isinstance(note.value, str):
                features = _add_feature_string(features, note.value)
            elif note.type == elfnote.SUPPORTED_FEATURES and isinstance(note.value, int):
                supported = features.supported | note.value & 0xFFFF_FFFF
                features = Features(supported, features.required, features.unknown, features.unknown_required)

        def address(type_: int) -> int | None:
            value = last.get(type_)
            return value if isinstance(value, int) and value != _UNSET else None

        def text(type_: int) -> str:
            value = last.get(type_, "")
            return value if isinstance(value, str) else ""

        legacy = source is NoteSource.LEGACY
        virt_base, hypercall_page = address(elfnote.VIRT_BASE), address(elfnote.HYPERCALL_PAGE)
        if legacy and hypercall_page is not None:  # the legacy string has a pfn
            hypercall_page = (hypercall_page << 12) + (virt_base or 0) & _UNSET
        phys32_entry, phys32_reloc = address(elfnote.PHYS32_ENTRY), last.get(elfnote.PHYS32_RELOC)
        return cls(
            virt_base=virt_base,
            entry=address(elfnote.ENTRY),
            paddr_offset=address(elfnote.PADDR_OFFSET),
            hypercall_page=hypercall_page,
            hv_start_low=address(elfnote.HV_START_LOW),
            init_p2m=address(elfnote.INIT_P2M),
            phys32_entry=None if phys32_entry in {None, _UNSET32} else phys32_entry & _UNSET32,
            phys32_reloc=phys32_reloc if isinstance(phys32_reloc, tuple) else None,
            mod_start_pfn=bool(address(elfnote.MOD_START_PFN)),
            suspend_cancel=bool(address(elfnote.SUSPEND_CANCEL)),
            bsd_symtab=elfnote.BSD_SYMTAB in last and (legacy or last[elfnote.BSD_SYMTAB] == "yes"),
            pae=_parse_pae_mode(text(elfnote.PAE_MODE), legacy=legacy),
            features=features,
            loader=text(elfnote.LOADER),
            guest_os=text(elfnote.GUEST_OS),
            guest_version=text(elfnote.GUEST_VERSION),
            xen_version=text(elfnote.XEN_VERSION),
        )


def feature_names(bits: int) -> list[str]:
    """Return the names of feature bits; "bit 27" for one without a name."""
    return [XENFEAT.get(bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]


def _add_feature_string(features: Features, text: str) -> Features:
    supported, required = features.supported, features.required
    unknown, unknown_required = list(features.unknown), list(features.unknown_required)
    for item in filter(None, text.split("|")):
        name = item.removeprefix("!")
        bit = _BIT_BY_NAME.get(name, 0)
        supported |= bit
        if name != item:
            required |= bit
        if not bit:
            (unknown if name == item else unknown_required).append(name)
    return Features(supported, required, tuple(unknown), tuple(unknown_required))


def _parse_pae_mode(text: str, *, legacy: bool) -> Pae:
    if legacy:
        if text == "yes[extended-cr3]":
            return Pae.EXTENDED_CR3
        return Pae.YES if text.startswith("yes") else Pae.NO
    if "bimodal" in text:
        return Pae.BIMODAL
    return Pae.EXTENDED_CR3 if text == "yes" else Pae.NO
