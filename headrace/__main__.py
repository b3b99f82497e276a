"""`python -m headrace` and the console script `headrace`: starts the command line, which is in `deploy`.

The wheel holds the client alone, without `deploy` and the workers. There, `--help` and `--version` work, and every command ends
with exit code 1 and one line that says where commands run.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main"]

_ROOMS = ("deploy", "model", "state", "stream")
_BESIDE = Path(__file__).resolve().parents[1]
_HELP = """\
Usage: headrace [OPTIONS] COMMAND [ARGS]...

  This installation is Headrace's client: `from headrace import Client`. Commands run
  in a checkout of the project (`make setup`) and in its image (deploy/Dockerfile).

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.
"""


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    try:
        if not all((_BESIDE / room / "__init__.py").is_file() for room in _ROOMS):
            sys.exit(_client_alone(sys.argv[1:]))
        sys.exit(_run())
    except KeyboardInterrupt:  # while modules are imported; later `deploy.cli.failures` does the same
        sys.exit(130)


def _run() -> int:
    try:
        from deploy.cli import console
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in (*_ROOMS, "headrace"):
            raise
        return _fail(
            f"Python package {package}: expected it for the command line, found none. Run `make setup` in the checkout "
            f"{_BESIDE}, which installs what the commands need."
        )
    return int(console() or 0)


def _client_alone(arguments: list[str]) -> int:
    """Answer `--help` and `--version`, and reject every command, where only the client is installed. Returns the exit code."""
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(_HELP)
        return 0
    if arguments == ["--version"]:
        from importlib.metadata import version

        sys.stdout.write(f"headrace, version {version('headrace')}\n")
        return 0
    words = " ".join(["headrace", *arguments[:1]])
    return _fail(
        f"{words}: expected a checkout of the project or its image, found the client alone. Run commands in a checkout (`make "
        "setup`) or in the image (deploy/Dockerfile); the client is `from headrace import Client`."
    )


def _fail(line: str) -> int:
    sys.stderr.write(f"Error: {line}\n")
    return 1


if __name__ == "__main__":
    main()
