"""`deploy/install_uv.sh` and what the Makefile makes of it, against stand-ins for Python: nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "install_uv.sh"
UV = "#!/bin/sh\necho uv 9.9\n"
# Answers as Python does: `-m pip install --user` by $PIP, `-m venv` by $VENV, `-c` prints the user's scripts folder or judges
# the version.
PYTHON = """#!/bin/sh
case "$*" in
"-m pip install --user"*) [ "$PIP" = ok ] || exit 1; mkdir -p "$HOME/scripts"; cp "$UV" "$HOME/scripts/uv" ;;
"-m pip install"*) cp "$UV" "$(dirname "$0")/uv" ;;
"-m venv "*) [ "$VENV" = ok ] || { echo "ensurepip is not available"; exit 1; }; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-c import sysconfig"*) echo "$HOME/scripts" ;;
"-c import sys;"*) [ "$OLD" != yes ] ;;
--version) echo "Python 3.9.1" ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with the stand-in as python3, and the few tools that the script uses."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "mkdir", "cp", "ln", "dirname", "test", "touch", "make"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"{tool} is not on this machine")
        (tools / tool).symlink_to(found)
    (tools / "python3").write_text(PYTHON)
    (tools / "python3").chmod(0o755)
    uv = tmp_path / "uv"
    uv.write_text(UV)
    uv.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": str(tools), "HOME": str(home), "UV": str(uv)}


def install(environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT)], env=environment | more, capture_output=True, text=True, check=False)


def installed(environment: dict[str, str]) -> Path:
    uv = Path(environment["HOME"], ".local", "bin", "uv")
    assert os.access(uv, os.X_OK)
    return uv.resolve()


def test_by_pip_for_the_user(machine: dict[str, str]) -> None:
    assert install(machine, PIP="ok", VENV="no").returncode == 0
    assert installed(machine) == Path(machine["HOME"], "scripts", "uv")


def test_in_an_environment_of_its_own_when_pip_refuses(machine: dict[str, str]) -> None:
    assert install(machine, PIP="no", VENV="ok").returncode == 0
    assert installed(machine) == Path(machine["HOME"], ".local", "share", "headrace-uv", "bin", "uv")
    assert install(machine, PIP="no", VENV="ok").returncode == 0, "again does no harm"


def test_what_to_do_when_neither_works(machine: dict[str, str]) -> None:
    result = install(machine, PIP="no", VENV="no")
    assert result.returncode == 1
    assert "ensurepip is not available" in result.stdout
    assert "uv: could not be installed with python3" in result.stderr
    assert "apt install python3-venv python3-pip" in result.stderr


def test_no_python(machine: dict[str, str]) -> None:
    result = install(machine, PYTHON="python9")
    assert result.returncode == 1
    assert "found no python9. Install Python 3.11" in result.stderr


def make(machine: dict[str, str], tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    checkout = tmp_path / "checkout"
    (checkout / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    shutil.copy(SCRIPT, checkout / "deploy")
    (checkout / "requirements.lock").touch()
    (checkout / "pyproject.toml").touch()
    environment = {key: value for key, value in machine.items() if key != "UV"} | more
    return subprocess.run(["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_the_makefile_uses_what_the_script_installed(machine: dict[str, str], tmp_path: Path) -> None:
    result = make(machine, tmp_path, "-n", "setup")
    assert result.returncode == 0, result.stderr
    uv = f"{machine['HOME']}/.local/bin/uv"
    assert f'{uv} --version >/dev/null 2>&1 || PYTHON="{machine["PATH"]}/python3" deploy/install_uv.sh' in result.stdout
    assert f"{uv} venv --quiet --python {machine['PATH']}/python3 .venv" in result.stdout
    assert f"{uv} pip sync --quiet --require-hashes" in result.stdout


def test_without_a_home_to_write_to_the_checkout_takes_its_place(machine: dict[str, str], tmp_path: Path) -> None:
    result = make(machine, tmp_path, "-n", "setup", HOME=str(tmp_path / "no such folder"))
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/checkout/.home/.local/bin/uv pip sync" in result.stdout


def test_the_makefile_prefers_a_uv_that_works(machine: dict[str, str], tmp_path: Path) -> None:
    uv = Path(machine["PATH"], "uv")
    uv.write_text("#!/bin/sh\nexit 127\n")
    uv.chmod(0o755)
    broken = make(machine, tmp_path / "broken", "-n", "setup")
    assert f"{machine['HOME']}/.local/bin/uv pip sync" in broken.stdout
    uv.write_text(UV)
    works = make(machine, tmp_path / "works", "-n", "setup")
    assert f"{uv} pip sync" in works.stdout


def test_the_makefile_says_which_python_it_needs(machine: dict[str, str], tmp_path: Path) -> None:
    result = make(machine, tmp_path, "setup", OLD="yes")
    assert result.returncode == 2
    assert "Python: expected 3.11 or newer on PATH, found Python 3.9.1." in result.stderr
    assert "make PYTHON=/path/to/python3.11 setup" in result.stderr
