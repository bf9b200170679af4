"""Fuzz the converter. One invariant: whatever it accepts, deep verify passes; whatever it does not leaves no file.

And of streams of today it refuses nothing in which verify finds nothing. Legacy streams of every kind are among the
inputs.

python -m tests.fuzz.convert [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.run import main
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.legacy import Legacy, hvm_stream, in_xl, pv_stream, remus_stream, whole
from tests.support.writers.stream import NOTAB, PAGE, Stream
from xenpv.convert.convert import ConvertOptions
from xenpv.convert.file import convert
from xenpv.errors import RequestError, StreamError
from xenpv.io.stream_input import Input
from xenpv.stream.envelope import Kind
from xenpv.verify.stream import verify


@cache
def legacy() -> tuple[Stream, ...]:
    """A small legacy stream of each kind."""
    small, wire = pv_domain(pfns=range(36)), Legacy()
    rounds = [[wire.pages([(3, NOTAB), (4, NOTAB)], []), wire.compressed(whole(b"a" * PAGE) + whole(b"b" * PAGE))]]
    return (
        *(pv_stream(small, Legacy(long), batch=16) for long in (4, 8)),
        pv_stream(pv_domain(width=4, pfns=range(36), vcpus=2, tree=True), batch=16),
        in_xl(pv_stream(small, batch=16), config_json() + b"\0"),
        *(hvm_stream(Legacy(long), pages=4) for long in (4, 8)),
        remus_stream(small, [*rounds, [wire.pages([(3, NOTAB)], []), wire.compressed(b"\0")]], batch=16),
    )


def target(data: bytes, n: int) -> None:
    """Convert one input, or a mutated legacy stream for every odd number."""
    rng = Random(n)
    if n % 2:
        stream = Stream(rng.choice(legacy()))
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            rng.choice(mutate.OF_A_STREAM[:4] + mutate.OF_A_STREAM[5:])(rng, stream)
        data = bytes(stream)
        if rng.random() < 0.15:
            data = data[: rng.randrange(len(data) + 1)]
    options = ConvertOptions(
        rng.choice((None, Kind.XL, Kind.LIBXL, Kind.LIBXC)),
        batch=rng.choice((None, 1, 10)),
        drop_zero=rng.random() < 0.3,
        drop_emulator=rng.random() < 0.5,
    )
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        stream_input = Input.open(str(source))
        try:
            result = convert(stream_input, str(out), options)
        except (StreamError, RequestError) as e:
            assert "\n" not in str(e)  # noqa: PT017
            assert [path.name for path in Path(folder).iterdir()] == ["in"]
            if n % 2 == 0 and not options.drop_zero and "device model" not in str(e):
                assert faulty(source), f"refused a sound stream: {e}"  # noqa: PT017
            return
        finally:
            stream_input.close()
        report = verify(str(out))
        assert report.ok, [str(finding) for finding in report.findings]
        assert report.pages <= result.pages
        assert result.bytes_out == out.stat().st_size


def faulty(path: Path) -> bool:
    """Return whether verify finds an error or a warning in a file, or no stream."""
    try:
        report = verify(str(path))
    except StreamError:
        return True
    return len(report.findings) > 0


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.convert"))
