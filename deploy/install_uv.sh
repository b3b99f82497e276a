#!/bin/sh
# Installs uv for this user with the machine's own Python, so that ~/.local/bin/uv is there. `make setup` runs it when uv is
# missing. PYTHON chooses the Python.
set -eu

python=${PYTHON:-python3}
bin=$HOME/.local/bin

if ! command -v "$python" >/dev/null 2>&1; then
    echo "uv: expected Python 3.11 or newer to install it with, found no $python. Install Python 3.11" \
        "(Debian, Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3 …" >&2
    exit 1
fi

link() { # a file called uv, made known under ~/.local/bin
    mkdir -p "$bin"
    [ "$1" = "$bin/uv" ] || ln -sf "$1" "$bin/uv"
    "$bin/uv" --version >&2
}

echo "uv is not installed: installing it for this user …" >&2
if "$python" -m pip install --user --quiet --disable-pip-version-check uv 2>/dev/null; then
    scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))')
    if [ -x "$scripts/uv" ]; then
        link "$scripts/uv"
        exit 0
    fi
fi

# pip is missing, or refuses since the system manages its packages (PEP 668), or this Python is a virtual environment's.
home=${XDG_DATA_HOME:-$HOME/.local/share}/headrace-uv
if "$python" -m venv "$home" && "$home/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
    link "$home/bin/uv"
    exit 0
fi

echo "uv: could not be installed with $python, by pip or in a virtual environment (what they said is above). Install it" \
    "yourself, or what they need (Debian, Ubuntu: apt install python3-venv python3-pip), and start again." >&2
exit 1
