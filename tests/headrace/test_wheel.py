"""The wheel, installed into an empty environment: what is in it, what it declares, the README's lines, and every command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import click
import pytest

from deploy.cli import cli
from deploy.settings import Settings
from headrace import Client

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND_S = 60.0
INSTALL_S = 180.0
# What uv says where no index can be reached.
NO_INDEX = re.compile(
    r"error sending request|dns error|failed to lookup|connection refused|timed out|failed to fetch", re.IGNORECASE
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=INSTALL_S)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel and what it declares, in the versions of requirements.lock; nothing else."""
    uv = shutil.which("uv") or str(Path.home() / ".local" / "bin" / "uv")
    if not Path(uv).is_file():
        pytest.skip("no uv on PATH or in ~/.local/bin, which installs the wheel")
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=INSTALL_S)
    install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    install += ["--constraints", str(ROOT / "requirements.lock"), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    if done.returncode != 0 and NO_INDEX.search(done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr[:300]}")
    assert done.returncode == 0, done.stderr
    return folder


def run(environment: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program of the environment, in a folder that isn't the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "PYTHON"))}
    program = str(environment / "bin" / arguments[0])
    return subprocess.run(
        [program, *arguments[1:]], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=COMMAND_S
    )


def test_the_wheel_holds_the_client_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        declared = HeaderParser().parsestr(archive.read(metadata).decode())
    assert {name.split("/")[0] for name in names} == {"headrace", metadata.split("/")[0]}
    assert "headrace/py.typed" in names
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "headrace").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    parts = re.compile(r"[\w.-]+|[<>=]+[\w.]+")  # of "kafka-python[lz4]>=3,<4", which the build tool writes in another order
    assert {frozenset(parts.findall(each)) for each in declared.get_all("Requires-Dist", [])} == {
        frozenset(parts.findall(each)) for each in PROJECT["dependencies"]
    }
    assert declared.get_all("Provides-Extra") is None, "an extra of the wheel would promise what it doesn't hold"


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every group and command below one, by its words."""
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            child = group.get_command(context, name)
            assert child is not None
            yield (*path, name)
            yield from commands(child, (*path, name))


def test_every_command_says_where_it_runs(environment: Path, tmp_path: Path) -> None:
    every = list(commands(cli))
    assert ("run", "join") in every and len(every) > 30
    for words in every:
        for more in ((), ("--help",)):
            done = run(environment, "headrace", *words, *more, folder=tmp_path)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == (
                f"Error: headrace {words[0]}: expected a checkout of the project or its image, found the client alone. Run "
                "commands in a checkout (`make setup`) or in the image (deploy/Dockerfile); the client is `from headrace "
                "import Client`.\n"
            )


def test_the_program_itself(environment: Path, tmp_path: Path) -> None:
    for start in (("headrace",), ("python", "-W", "ignore", "-m", "headrace")):
        for option in ("--help", "-h"):
            done = run(environment, *start, option, folder=tmp_path)
            assert (done.returncode, done.stderr) == (0, "") and "a checkout of the project" in done.stdout
        version = run(environment, *start, "--version", folder=tmp_path)
        assert (version.returncode, version.stdout) == (0, f"headrace, version {PROJECT['version']}\n")
        bare = run(environment, *start, folder=tmp_path)
        assert bare.returncode == 1 and bare.stderr.startswith("Error: headrace: expected a checkout")


# A scorer answers what the README's lines ask; `subscribe_scores` hears it, too.
AROUND = """
import sys
from headrace import Client as _Client

class Client(_Client):
    def __init__(self, address):
        assert address == "127.0.0.1:9092"
        super().__init__(sys.argv[1], topic_prefix=sys.argv[2])

    def ask(self, *arguments):
        return super().ask(*arguments, timeout_ms=20_000)

with Client("127.0.0.1:9092") as following, following.subscribe_scores() as scores:
    print("following", flush=True)
{lines}
    [answer] = scores.poll(timeout_ms=10_000)
    print(answer.scores[0].id, flush=True)
"""


@pytest.mark.kafka
def test_the_readmes_lines(environment: Path, topics: Settings, tmp_path: Path) -> None:
    from tests.headrace.test_client import records

    [lines] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert "send_impression" in lines and "send_click" in lines and "ask(" in lines
    own = lines.replace("from headrace import Client\n", "")
    program = tmp_path / "readme.py"
    program.write_text(AROUND.format(lines="".join(f"    {line}\n" for line in own.splitlines())))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    prefix = topics.topics.prefix
    command = [str(environment / "bin" / "python"), "-W", "ignore::DeprecationWarning", str(program)]
    with (
        subprocess.Popen(
            [*command, topics.kafka.bootstrap_servers, prefix],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child,
        Client(topics.kafka.bootstrap_servers, topic_prefix=prefix) as scorer,
    ):
        try:
            while child.poll() is None and not (asked := records(topics, "score-requests")):
                pass
            for request in asked:
                scorer.send_raw(
                    f"{prefix}scores",
                    request.key,
                    b'{"request_id":"%s","scores":[{"id":"film-1","score":0.25}],"model_version":1}' % request.key,
                )
            scorer.flush()
            out, err = child.communicate(timeout=COMMAND_S)
        finally:
            child.kill()
    assert (child.returncode, out.split(), err) == (0, ["following", "film-1"], "")
    assert [record.key for name in ("impressions", "clicks") for record in records(topics, name)] == [b"imp-1", b"imp-1"]
