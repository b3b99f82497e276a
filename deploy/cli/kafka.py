"""`headrace kafka`: runs Apache Kafka itself on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from deploy.cli.common import echo_json, format_option

if TYPE_CHECKING:
    from deploy.local_kafka.cluster import KafkaStatus, LocalKafka
    from deploy.settings import LocalKafkaSettings

__all__ = ["kafka"]

VARIABLE = "HEADRACE_KAFKA__BOOTSTRAP_SERVERS"


class _Folder(click.Path):
    """A folder's name, not empty: `--dir "$UNSET"` would otherwise make `reset` remove data from the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a folder, found an empty name. Pass one; `.` is the current folder.", param, ctx)
        return super().convert(value, param, ctx)


def _dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dir",
        "folder",
        type=_Folder(file_okay=False, path_type=Path),
        help="The folder of its data, logs and ports. Default: the setting local_kafka.dir.",
    )(function)


@click.group()
def kafka() -> None:
    """Run a local Apache Kafka, in the background.

    \b
    Examples:
      headrace kafka start                      one broker; prints its address
      headrace kafka start --brokers 3          a cluster that survives the loss of one
      eval "$(headrace kafka start | grep ^export)"   start it, and let this shell's commands use it
      headrace kafka stop                       its data stays
    """


@kafka.command()
@click.option(
    "--brokers", type=click.Choice(["1", "3"]), help="How many brokers. Default: as many as the folder already holds, else 1."
)
@_dir_option
@format_option
def start(brokers: str | None, folder: Path | None, output: str) -> None:
    """Start Kafka, wait until it answers, and print its address.

    A cluster that is started again keeps its data and its ports. Brokers that already run are left alone. The first start
    downloads Apache Kafka's jars (45 MB, checked against pinned hashes) into a cache.

    \b
    Examples:
      headrace kafka start
      headrace kafka start --brokers 3 --dir /tmp/three
    """
    from deploy.local_kafka.cluster import LocalKafka

    settings = _local_settings(folder)
    count = int(brokers) if brokers else LocalKafka(settings).status().brokers or 1
    with _progress() as on_progress:
        local = LocalKafka(settings, count, on_progress=on_progress)
        address = local.start()
    if output == "json":
        _echo_status(local.status(), output)
        return
    click.echo(f"Kafka runs at {address}. Its logs are in {local.dir / 'logs'}.", err=True)
    click.echo(address)
    click.echo(f"export {VARIABLE}={address}")


@kafka.command()
@_dir_option
@format_option
def stop(folder: Path | None, output: str) -> None:
    """Stop Kafka. Its data and its ports stay.

    \b
    Examples:
      headrace kafka stop
      headrace kafka stop --dir /tmp/three
    """
    local = _local(folder)
    was = local.status()
    killed = local.stop()
    if killed:
        click.echo(
            f"{len(killed)} broker(s) did not stop when asked and were killed; their logs are checked at the next start.",
            err=True,
        )
    _echo_status(local.status(), output, note="It did not run." if was.state in ("stopped", "absent") else "")


@kafka.command()
@_dir_option
@format_option
def status(folder: Path | None, output: str) -> None:
    """Print whether Kafka runs, and where. Exit code 1 unless all brokers run.

    \b
    Examples:
      headrace kafka status
      headrace kafka status --format json
    """
    now = _local(folder).status()
    _echo_status(now, output)
    if now.state != "running":
        click.get_current_context().exit(1)


@kafka.command()
@click.option("--yes", is_flag=True, help="Don't ask for confirmation.")
@click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")
@_dir_option
@format_option
def reset(yes: bool, dry_run: bool, folder: Path | None, output: str) -> None:
    """Stop Kafka and remove all its data: topics, records, offsets, logs.

    \b
    Examples:
      headrace kafka reset --dry-run
      headrace kafka reset --yes
    """
    local = _local(folder)
    was = local.status()
    if was.state == "absent":
        _echo_status(was, output, note="There is nothing to remove.")
        return
    megabytes = sum(file.stat().st_blocks * 512 for file in local.dir.rglob("*") if file.is_file()) / 1e6
    click.echo(f"{was.dir}: {was.brokers} broker(s), {was.state}, {megabytes:.0f} MB on disk.", err=True)
    if dry_run:
        _echo_status(was, output, note="Nothing was removed (--dry-run).")
        return
    if not yes:
        click.confirm("Stop it and remove all of that?", abort=True, err=True)
    local.reset()
    _echo_status(local.status(), output, note="Removed.")


def _local_settings(folder: Path | None) -> LocalKafkaSettings:
    from deploy.settings import load_settings

    settings = load_settings().local_kafka
    return settings if folder is None else settings.model_copy(update={"dir": folder})


def _local(folder: Path | None) -> LocalKafka:
    from deploy.local_kafka.cluster import LocalKafka

    return LocalKafka(_local_settings(folder))


def _echo_status(status: KafkaStatus, output: str, note: str = "") -> None:
    if output == "json":
        echo_json(msgspec.to_builtins(status, str_keys=True))
        return
    if note:
        click.echo(note, err=True)
    click.echo(f"state      {status.state}")
    click.echo(f"version    Apache Kafka {status.version}")
    click.echo(f"folder     {status.dir}")
    if status.brokers:
        click.echo(f"address    {status.bootstrap_servers}")
        pids = ", ".join(f"{node} (pid {pid})" for node, pid in status.pids.items()) or "none"
        click.echo(f"brokers    {len(status.pids)} of {status.brokers} running: {pids}")
    else:
        click.echo("Start it with `headrace kafka start`.", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal, a bar while jars are downloaded and a spinner while brokers start; elsewhere, a line for each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        said: set[str] = set()

        def say(what: str, done: int, total: int) -> None:
            if what not in said:
                said.add(what)
                click.echo(f"{what} …", err=True)

        yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=done)

        yield show
