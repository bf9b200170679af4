"""The rules of the stream's framing, order and records, with their sources.

SPEC is xen.git:docs/specs/libxc-migration-stream.pandoc, LIBXL_SPEC its libxl twin; the functions are those of
xen.git:tools/libs/guest/xg_sr_restore.c, xg_sr_restore_x86_pv.c and xg_sr_common.c.
"""

from __future__ import annotations

from collections.abc import Callable

from xenpv.errors import Malformed, OutOfOrder, SealBroken, StreamError, Truncated, Unsupported
from xenpv.findings import Rule, Severity

SPEC = "libxc-migration-stream.pandoc"
LIBXL_SPEC = "libxl-migration-stream.pandoc"
WARNING = Severity.WARNING

# --- envelopes and headers -----------------------------------------------------------------------------------------
ENVELOPE = Rule(
    "envelope", "the envelope's header has the values its tool accepts", "tools/xl/xl_vmcontrol.c create_domain"
)
CONFIG_SYNTAX = Rule(
    "config-syntax", "the configuration is JSON or XML to its end", "libxl_domain_config_from_json(); libxml2"
)
CONFIG_TYPE = Rule(
    "config-type", "the configuration has a domain's type, that of the stream", "libxl__domain_create_info_setdefault()"
)
CONFIG_UUID = Rule("config-uuid", "the configuration's uuid is one", "libxl_uuid_from_string()")
CONFIG_LIMITS = Rule(
    "config-limits",
    "memory and vcpus of the configuration are numbers that a domain can have",
    "libxl__int_parse_json(); libxl__domain_make()",
)
CONFIG_IGNORED = Rule(
    "config-ignored",
    "every member of the configuration has a value that the toolstack uses, and nothing follows",
    "libxl__json_map_get(); libxl__yajl_alloc(): a member of another kind counts as missing",
    WARNING,
)
LIBXL_HEADER = Rule("libxl-header", "ident LibxlFmt, version 2, no reserved option bits", f"{LIBXL_SPEC} Header")
IMAGE_HEADER = Rule("image-header", "marker all ones, id XENF, version 2 or 3, little-endian", "read_headers()")
DOMAIN_HEADER = Rule(
    "domain-header", "domain type is x86 PV or x86 HVM, page shift 12", f"{SPEC} Domain Header; x86_pv_setup()"
)
LEGACY = Rule("legacy", "a legacy stream is made as the savers of before Xen 4.6 made them", "xc_domain_restore.c")
XEN_VERSION = Rule(
    "xen-version", "the Xen version in the domain header is one that existed", f"{SPEC} Domain Header", WARNING
)

# --- framing -------------------------------------------------------------------------------------------------------
TRUNCATED = Rule("truncated", "the stream goes on until its END record", "read_exact()")
TRAILING = Rule("trailing-data", "nothing follows the END record", f"{SPEC} END", WARNING)
RECORD_LENGTH = Rule("record-length", "no record is longer than 128 MiB", "read_record() REC_LENGTH_MAX")
RECORD_SIZE = Rule("record-size", "a record has the size that its type and counts demand", f"{SPEC} Records")
RECORD_UNKNOWN = Rule("record-unknown", "every mandatory record is of a known type", f"{SPEC} Records; restore()")
RECORD_OPTIONAL = Rule(
    "record-optional",
    "no record of the specification is marked optional",
    f"{SPEC} Records: it is passed over",
    WARNING,
)
RECORD_EMPTY = Rule("record-empty", "data records with no content are left out", f"{SPEC} Layout; Errata 1", WARNING)
PADDING = Rule("padding-zero", "records are padded with zeroes", f"{SPEC} Records", WARNING)
RESERVED = Rule("reserved-zero", "reserved fields are set to zero on save", f"{SPEC} Fields", WARNING)

# --- order ---------------------------------------------------------------------------------------------------------
ORDER = Rule("record-order", "a record comes after the records that it depends on", f"{SPEC} Layout")
REPEATED = Rule(
    "record-repeated", "a record that may come once comes once", "handle_x86_pv_info(), handle_static_data_end()"
)
MISPLACED = Rule("record-misplaced", "a record belongs to the domain's type and the stream's version", f"{SPEC} Layout")
MISSING = Rule("record-missing", "every record that a domain cannot be restored without is there", f"{SPEC} Layout")
CHECKPOINT = Rule("checkpointed", "the stream needs no checkpoint-aware receiver", "handle_checkpoint()", WARNING)

# --- records -------------------------------------------------------------------------------------------------------
PV_INFO = Rule("pv-info", "width 4 goes with 3 page-table levels, width 8 with 4", "valid_x86_pv_info_combination()")
P2M_RANGE = Rule(
    "p2m-frames-range",
    "start pfn is not above end pfn, one frame for each p2m page",
    "handle_x86_pv_p2m_frames(); XENPV_P2M_LEAVES: docs/reference/records.md",
)
PAGE_COUNT = Rule("page-data-count", "PAGE_DATA has at least one pfn, and room for all of them", "handle_page_data()")
PAGE_TYPE = Rule(
    "page-type", "page types are NOTAB, L1 to L4 tables, pinned or not, BROKEN, XALLOC, XTAB", "is_known_page_type()"
)
PAGE_RANGE = Rule("pfn-range", "no pfn lies beyond the last p2m entry", "handle_page_data() pfn_is_valid")
PAGE_SIZE_MATCH = Rule(
    "page-data-size", "PAGE_DATA holds one page for each pfn whose type has content", "handle_page_data()"
)
VCPU_ID = Rule("vcpu-id", "a vcpu id is below what Xen can number", "handle_x86_pv_vcpu_blob()")
VCPU_SIZE = Rule("vcpu-size", "a vcpu's blob has the size that the guest's width demands", "handle_x86_pv_vcpu_blob()")
EMULATOR = Rule(
    "emulator", "emulator records name a known emulator and hold NUL-terminated pairs", f"{LIBXL_SPEC} Emulator"
)

SEAL = Rule("seal", "a sealed stream is what was sealed", "XENPV_SEAL: docs/reference/records.md")
SEAL_UNCHECKED = Rule(
    "seal-unchecked", "a seal can be checked: its key and its library are there", "docs/reference/records.md", WARNING
)
SEAL_COVERAGE = Rule(
    "seal-coverage", "--require-seal: a checked seal covers the whole stream", "docs/reference/records.md"
)

_ERRORS: dict[Rule, type[StreamError]] = {
    TRUNCATED: Truncated,
    ORDER: OutOfOrder,
    REPEATED: OutOfOrder,
    MISPLACED: OutOfOrder,
    MISSING: OutOfOrder,
    RECORD_UNKNOWN: Unsupported,
    SEAL: SealBroken,
}


BreachHandler = Callable[[Rule, str, int, str | None], None]
"""on_breach(rule, message, offset, record): called for each breach of a rule, instead of an exception."""


def breach(rule: Rule, message: str, *, offset: int, record: str | None) -> StreamError:
    """Return the error that says that a rule was broken there."""
    return _ERRORS.get(rule, Malformed)(message, offset=offset, record=record, rule=rule.name)
