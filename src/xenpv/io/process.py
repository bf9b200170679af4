"""Settings of the process that must be made before NumPy is imported."""

from __future__ import annotations

import os


def use_one_blas_thread() -> None:
    """Keep NumPy from starting threads for linear algebra.

    Nothing here uses them, and they take time to start.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
