"""The command `headrace`: its commands, each imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

import click

from deploy.cli.common import quiet_clients
from deploy.cli.failures import telling
from deploy.cli.standard_streams import prepare

__all__ = ["cli", "console", "main"]

# command → module:attribute. Importing this package imports none of the modules, so `headrace --help` loads no torch.
COMMANDS = {
    "bootstrap": "deploy.cli.bootstrap:bootstrap",
    "config": "deploy.cli.config:config",
    "data": "deploy.cli.data:data",
    "dead-letters": "deploy.cli.dead_letters:dead_letters",
    "demo": "deploy.cli.demo:demo",
    "doctor": "deploy.cli.doctor:doctor",
    "evaluate": "deploy.cli.evaluate:evaluate",
    "kafka": "deploy.cli.kafka:kafka",
    "model": "deploy.cli.model:model",
    "replay": "deploy.cli.replay:replay",
    "run": "deploy.cli.run:run",
    "scores": "deploy.cli.scores:scores",
    "simulate": "deploy.cli.simulate:simulate",
    "snapshot": "deploy.cli.snapshot:snapshot",
    "topics": "deploy.cli.topics:topics",
    "watermarks": "deploy.cli.watermarks:watermarks",
}


class LazyGroup(click.Group):
    """A group that imports a command on first use, and turns every error into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with telling():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with telling(ctx):
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
def cli() -> None:
    """Online learning from a stream: impressions and clicks in through Kafka, fresh click predictions out.

    \b
    Examples:
      headrace kafka start                        run a local Apache Kafka
      headrace topics create                      create the nine topics
      headrace run join                           start a join worker (also: trainer, scorer)
      headrace replay kuairand --speed 1000       send recorded impressions and clicks
      headrace snapshot rollback                  serve the last good model again
    """
    quiet_clients()


def console() -> Any:
    """Run the command line as a process of its own, with usable standard streams (`deploy.cli.standard_streams`)."""
    prepare()
    return main()


def main(argv: list[str] | None = None) -> Any:
    """Run the command line, then end the process. Every error is one line on stderr (`deploy.cli.failures`)."""
    return cli.main(args=argv, prog_name="headrace", standalone_mode=True)
