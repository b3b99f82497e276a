"""What the commands of `headrace snapshot` share: settings, operations, versions by number or by alias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deploy.cli.common import ask_kafka, who

if TYPE_CHECKING:
    from deploy.settings import Settings
    from stream.registry.operations import Operations
    from stream.topics.names import TopicNames

__all__ = ["ABOUT", "command_settings", "operations_of", "reason_option", "resolve", "topic_names", "version_argument"]

ABOUT = "the registry of versions"

reason_option = click.option("--reason", required=True, help="Why; it stays in the registry.")
version_argument = click.argument("version", metavar="VERSION")
"""A number or an alias, for `resolve`."""


def command_settings() -> Settings:
    """The settings, as every command reads them."""
    from deploy.settings import load_settings

    return load_settings()


def topic_names(settings: Settings) -> TopicNames:
    """The names of the topics."""
    from stream.topics.names import TopicNames

    return TopicNames.of(settings.topics)


def operations_of(settings: Settings, *, unchecked: bool = False) -> Operations:
    """Operations in the name of who runs the command.

    Args:
        unchecked: don't look whether the store has a version before something is moved to it.
    """
    from state.store import SnapshotStore
    from stream.registry.operations import Operations

    store = None if unchecked else SnapshotStore(settings.snapshots)
    return Operations(settings.kafka, topic_names(settings), who(), store=store)


def resolve(settings: Settings, *versions: str) -> list[int]:
    """The numbers of versions that are given by number or by alias. Asks Kafka only for an alias.

    Raises:
        BadParameter: 0, which is no version.
        RegistryError: there is no such alias.
    """
    if any(version.strip("0") == "" for version in versions):
        raise click.BadParameter("versions are numbered from 1, found 0 or nothing", param_hint="'VERSION'")
    if all(version.isascii() and version.isdigit() for version in versions):
        return [int(version) for version in versions]
    from stream.errors import RegistryError
    from stream.registry.log import read_registry

    state = ask_kafka(settings, read_registry(settings.kafka, topic_names(settings)), ABOUT)
    aliases = {name: each.version for name, each in state.aliases.items() if each.version is not None}
    if state.champion.version is not None:
        aliases["champion"] = state.champion.version
    found = []
    for version in versions:
        number = int(version) if version.isascii() and version.isdigit() else aliases.get(version)
        if number is None:
            raise RegistryError(
                f"version {version!r}: expected a number or an alias ({', '.join(sorted(aliases)) or 'there is none'}), found "
                "neither. `headrace snapshot alias list` shows the aliases."
            )
        found.append(number)
    return found
