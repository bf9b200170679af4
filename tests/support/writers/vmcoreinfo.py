"""What a Linux kernel says of itself for debuggers, as it stands in its memory."""

from __future__ import annotations

RELEASE = b"6.1.0-50-amd64"
UTS_OFFSET = 16


def text(uts: int, release: bytes = RELEASE, top: int = 0xFFFF_FFFF_82A1_0000, more: bytes = b"") -> bytes:
    """``uts`` and ``top``: where init_uts_ns and the kernel's top page table are."""
    lines = [
        b"OSRELEASE=" + release,
        b"BUILD-ID=06f8bde30046985060c60820f7a11515a33afb06",
        b"PAGESIZE=4096",
        b"SYMBOL(init_uts_ns)=%x" % uts,
        b"OFFSET(uts_namespace.name)=%d" % UTS_OFFSET,
        b"SYMBOL(swapper_pg_dir)=%x" % top,
        b"SYMBOL(_stext)=ffffffff81000000",
        b"NUMBER(phys_base)=0",
        b"NUMBER(pgtable_l5_enabled)=0",
        b"KERNELOFFSET=0",
    ]
    return b"\n".join(lines) + b"\n" + more
