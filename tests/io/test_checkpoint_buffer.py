"""CheckpointBuffer: its file is closed once, and dropped content is an error rather than an endless loop."""

from __future__ import annotations

import os

import pytest

from xenpv.io.checkpoint_buffer import CheckpointBuffer
from xenpv.stream.page_data import PageData


@pytest.fixture
def buffer() -> CheckpointBuffer:
    buffer = CheckpointBuffer()
    page = PageData(raw=(5).to_bytes(8, "little"), pages=1, pages_offset=0, offset=0, length=8 + 8 + 4096)

    def read_into(view: memoryview) -> None:
        view[:] = b"x" * len(view)

    buffer.add(page, read_into)
    return buffer


def test_content_of_a_dropped_event_raises_value_error(buffer: CheckpointBuffer) -> None:
    [(_, read_into)] = buffer.events()
    content = bytearray(4096)
    read_into(memoryview(content))
    assert content == b"x" * 4096
    [(_, read_into)] = buffer.events()
    buffer.clear()
    with pytest.raises(ValueError, match="0x0"):  # the offset in the file
        read_into(memoryview(content))
    buffer.close()


def test_second_close_leaves_other_files_open(buffer: CheckpointBuffer) -> None:
    buffer.close()
    ours, theirs = os.pipe()  # get the descriptor that is free now
    buffer.close()
    os.close(ours)
    os.close(theirs)
