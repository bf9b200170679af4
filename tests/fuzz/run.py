"""The loop and the command line that the fuzz targets share."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tests.fuzz.mutate import case
from tests.support.memory_limit import peak_memory_below

MEASURED = 25  # every so many cases memory is measured
MIB = 1 << 20

Target = Callable[[bytes, int], None]
"""target(data, n): returns, or raises whatever shows that the invariant does not hold."""
MakeCase = Callable[[int, int], bytes]
"""make_case(seed, n): the n-th input of a seed."""


def run(
    target: Target,
    *,
    seed: int,
    cases: int | None = None,
    seconds: float | None = None,
    make_case: MakeCase = case,
) -> int:
    """Try cases 0, 1, 2 … of a seed until their number or the time is up; how many were tried.

    The first that fails raises, with a note that says which it was.
    """
    end = None if seconds is None else time.monotonic() + seconds
    n = 0
    while (cases is None or n < cases) and (end is None or time.monotonic() < end):
        data = make_case(seed, n)
        try:
            target(data, n)
        except BaseException as e:
            e.add_note(f"case {n} of seed {seed}")
            raise
        n += 1
    return n


@contextmanager
def bounded(n: int, size: int, *, memory: int, seconds: float = 10) -> Iterator[None]:
    """Holds what is inside to bytes of memory, of each 25th case since measuring takes its time, and to a time.

    ``n``: the case; ``size``: bytes of its input.
    """
    began = time.monotonic()
    with nullcontext() if n % MEASURED else peak_memory_below(memory):
        yield
    took = time.monotonic() - began
    assert took < seconds, f"{took:.1f} s for {size} bytes"


def main(target: Target, name: str, make_case: MakeCase = case) -> int:
    """``python -m NAME``: fuzz for a while, or have one case again."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="where to begin (default: the time)")
    parser.add_argument("--only", type=int, metavar="N", help="just the N-th case of the seed, kept as fuzz-SEED-N.bin")
    options = parser.parse_args()
    if options.only is not None:
        data = make_case(options.seed, options.only)
        Path(f"fuzz-{options.seed}-{options.only}.bin").write_bytes(data)
        target(data, options.only)
        print(f"case {options.only} of seed {options.seed} holds, {len(data)} bytes")
        return 0
    try:
        n = run(target, seed=options.seed, seconds=options.seconds, make_case=make_case)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        traceback.print_exc()
        which = e.__notes__[-1].split()
        print(f"again: python -m {name} --seed {options.seed} --only {which[1]}", file=sys.stderr)
        return 1
    print(f"{n} cases of seed {options.seed} hold")
    return 0
