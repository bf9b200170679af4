"""Volatility's own command line with xenpv's layer.

Run it as ``python -m xenpv.plugins.volatility``.
"""

import sys

try:
    from volatility3.cli import main
except ImportError:
    sys.exit("xenpv: error: this needs Volatility 3, which is not installed: pip install volatility3")

from xenpv.plugins.volatility import domain_layer  # noqa: F401  Volatility finds the classes that have been imported

if __name__ == "__main__":
    main()
