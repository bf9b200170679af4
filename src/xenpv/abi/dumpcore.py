"""The format of `xl dump-core`.

Source: xen.git:docs/misc/dump-core-format.txt, xen/include/public/elfnote.h.

ELF's own parts are those of the System V ABI. A core is ELFCLASS64 whatever the guest is, and EM_386 of a 32-bit one.
"""

from __future__ import annotations

import struct

ELF_MAGIC = b"\x7fELF"
ELFCLASS64 = 2
ELFDATA2LSB = 1
ET_CORE = 4
EM_386 = 3
EM_X86_64 = 62
SHT_NOTE = 7
# type machine version entry phoff shoff flags ehsize phentsize phnum shentsize shnum shstrndx, after e_ident
EHDR = struct.Struct("<16xHHIQQQIHHHHHH")
SHDR = struct.Struct("<IIQQQQIIQQ")  # name type flags addr offset size link info addralign entsize
NOTE = struct.Struct("<III")  # namesz descsz type

SEC_NOTE = ".note.Xen"
SEC_PRSTATUS = ".xen_prstatus"
SEC_SHARED_INFO = ".xen_shared_info"
SEC_P2M = ".xen_p2m"
SEC_PFN = ".xen_pfn"
SEC_PAGES = ".xen_pages"

XEN_ELFNOTE_DUMPCORE_NONE = 0x200_0000
XEN_ELFNOTE_DUMPCORE_HEADER = 0x200_0001
XEN_ELFNOTE_DUMPCORE_XEN_VERSION = 0x200_0002
XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION = 0x200_0003
HEADER_DESC = struct.Struct("<QQQQ")  # xch_magic xch_nr_vcpus xch_nr_pages xch_page_size
XEN_VERSION_DESC = struct.Struct("<QQ16s")  # major minor extra, …
FORMAT_VERSION_DESC = struct.Struct("<Q")
XC_CORE_MAGIC = 0xF00F_EBED
XC_CORE_MAGIC_HVM = 0xF00F_EBEE

P2M_ENTRY = 16  # bytes: pfn and gmfn, 64 bits each
PFN_ENTRY = 8
INVALID = (1 << 64) - 1  # a pfn or gmfn of no page
