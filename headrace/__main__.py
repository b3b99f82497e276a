"""`python -m headrace` and the console script: hands over to the command line in `deploy`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    from deploy.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
