"""`headrace run join|trainer|scorer`."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import click

from deploy.cli.common import model_option, track_option, with_model, with_track
from deploy.processes.leash import hold_leash
from deploy.processes.priority import give_way

__all__ = ["run"]


@click.group()
def run() -> None:
    """Run a worker until SIGTERM or Ctrl-C, which drains it: it finishes what it has begun, and ends.

    \b
    Examples:
      headrace run join
      headrace run trainer --device cuda
      headrace run scorer --http-port 9100        /metrics, /healthz, /readyz on that port
    """


def _common(function: Any) -> Any:
    function = click.option("--verbose", is_flag=True, help="Also log what Faust and aiokafka log below warnings.")(function)
    # For programs that start workers and hold the other end of standard input.
    function = click.option("--leash", is_flag=True, hidden=True, help="Stop when standard input ends.")(function)
    function = click.option(
        "--nice",
        type=click.IntRange(0, 19),
        default=0,
        help="Niceness, 0 to 19: 10 suits a join or trainer beside a scorer. Under Linux autogroups it affects other sessions "
        "only if this worker leads its own session, as a service, a container and `setsid headrace run …` do.",
    )(function)
    return click.option("--http-port", type=click.IntRange(0, 65_535), help="Instead of http.port; 0 takes a free port.")(
        function
    )


def _settings(http_port: int | None, nice: int, verbose: bool, leash: bool) -> Any:
    if leash:
        # First, since a worker imports, connects and takes over partitions for many seconds, and its parent may end meanwhile.
        hold_leash()
    give_way(nice)
    from deploy.logs import setup_logs
    from deploy.settings import load_settings

    setup_logs(verbose=verbose)
    settings = load_settings()
    if http_port is not None:
        settings = settings.model_copy(update={"http": settings.http.model_copy(update={"port": http_port})})
    return settings


@run.command()
@_common
def join(http_port: int | None, nice: int, verbose: bool, leash: bool) -> None:
    """Join impressions and clicks into labelled examples, each exactly once.

    \b
    Examples:
      headrace run join
      HEADRACE_JOIN__WINDOW_MS=1800000 headrace run join
    """
    settings = _settings(http_port, nice, verbose, leash)
    from stream.join.worker import run_join
    from stream.topics.names import TopicNames

    asyncio.run(
        run_join(
            kafka=settings.kafka,
            settings=settings.join,
            schema_registry=settings.schema_registry,
            names=TopicNames.of(settings.topics),
            http=settings.http,
            state_dir=settings.state_dir,
        )
    )


def _known_device(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from stream.settings import DEVICES

    if name is not None and not re.fullmatch(DEVICES, name):
        raise click.BadParameter(f"expected auto, cpu, cuda or cuda:N, found {name!r}.")
    return name


_device = click.option("--device", callback=_known_device, help="auto, cpu, cuda or cuda:N, instead of the setting.")


@run.command()
@_device
@model_option
@track_option
@click.option(
    "--new-model",
    is_flag=True,
    help="Train a new model from the start of the log, whatever the snapshot store holds. The champion stays until the new "
    "model has been compared with it. Takes over from a trainer that leads. For one start only: leave the option out "
    "afterwards.",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Lead at once, also while another trainer leads: that one ends. For one start only; a trainer that has itself taken "
    "over in the last 10 minutes is not replaced.",
)
@_common
def trainer(
    device: str | None,
    model: str | None,
    new_model: bool,
    take_over: bool,
    http_port: int | None,
    nice: int,
    verbose: bool,
    leash: bool,
) -> None:
    """Learn from labelled examples and publish snapshots.

    Several trainers may run. One leads and learns; the others stand by with the newest version loaded, and one of them goes on
    when the leader stops or isn't heard of for trainer.session_timeout_ms.

    \b
    Examples:
      headrace run trainer
      headrace run trainer --device cuda
      headrace run trainer --new-model               after a change of the schema, or to learn from scratch
      headrace run trainer --model fm --new-model    another model; later starts need --model fm or model.name
      headrace run trainer --take-over               lead instead of a trainer that can't be stopped
      headrace run trainer --track wide --model wide_deep    a challenger: `headrace model compare` shows how it does
    """
    settings = with_track(with_model(_settings(http_port, nice, verbose, leash), model))
    from state.tracks import MAIN
    from stream.topics.names import TopicNames
    from stream.trainer.run import run_trainer

    trainer_settings = settings.trainer.model_copy(update={"device": device}) if device else settings.trainer
    asyncio.run(
        run_trainer(
            kafka=settings.kafka,
            settings=trainer_settings,
            names=TopicNames.of(settings.topics, settings.snapshots.track or MAIN),
            http=settings.http,
            schema=settings.features,
            model=settings.model,
            table=settings.table,
            snapshots=settings.snapshots,
            new_model=new_model,
            take_over=take_over,
        )
    )


@run.command()
@_device
@_common
def scorer(device: str | None, http_port: int | None, nice: int, verbose: bool, leash: bool) -> None:
    """Answer score requests with the champion, and swap to each new champion while running.

    \b
    Examples:
      headrace run scorer
      HEADRACE_SNAPSHOTS__URL=s3://models/headrace headrace run scorer
    """
    settings = _settings(http_port, nice, verbose, leash)
    from stream.scorer.run import run_scorer
    from stream.topics.names import TopicNames

    scorer_settings = settings.scorer.model_copy(update={"device": device}) if device else settings.scorer
    asyncio.run(
        run_scorer(
            kafka=settings.kafka,
            settings=scorer_settings,
            names=TopicNames.of(settings.topics),
            http=settings.http,
            snapshots=settings.snapshots,
        )
    )
