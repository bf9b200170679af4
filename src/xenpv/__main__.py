"""``python -m xenpv``."""

from xenpv.cli.main import run

if __name__ == "__main__":
    run()
