"""`python -m headrace` and the console script: hands over to the command line in `deploy`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from deploy.cli import console as run

        sys.exit(run())
    except KeyboardInterrupt:  # while modules are imported; later `deploy.cli.failures` does the same
        sys.exit(130)


if __name__ == "__main__":
    main()
