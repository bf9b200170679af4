"""Volatility's own command line, which knows our layer: ``python -m xenpv.plugins.volatility``."""

from volatility3.cli import main

from xenpv.plugins.volatility import domain_layer  # noqa: F401  Volatility finds the classes that have been imported

if __name__ == "__main__":
    main()
