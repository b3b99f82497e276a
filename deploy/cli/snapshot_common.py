"""What the commands of `headrace snapshot` share: settings, operations, versions by number or by alias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deploy.cli.common import ask_kafka, who, with_track

if TYPE_CHECKING:
    from deploy.settings import Settings
    from stream.registry.operations import Operations
    from stream.topics.names import TopicNames

__all__ = [
    "ABOUT",
    "command_settings",
    "number_or_alias",
    "operations_of",
    "reason_option",
    "require_serving",
    "resolve",
    "settings_for",
    "stored_settings",
    "topic_names",
    "version_argument",
]

ABOUT = "the registry of versions"

reason_option = click.option("--reason", required=True, help="Why; it stays in the registry.")


def number_or_alias(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The callback of a parameter that names a version, for `resolve`. Raises BadParameter for 0."""
    if value is not None and not value.strip("0"):
        raise click.BadParameter(f"versions are numbered from 1, found {value!r}", context, parameter)
    return value


version_argument = click.argument("version", metavar="VERSION", callback=number_or_alias)
"""A number or an alias, for `resolve`."""


def command_settings() -> Settings:
    """The settings, as every command reads them, on the track that is named, or else on the one that serves.

    Raises:
        StreamError: the registry, which says which track serves, can't be read.
    """
    settings = stored_settings()
    if settings.snapshots.track:
        return settings
    from stream.registry.track_operations import serving_track
    from stream.topics.names import TopicNames

    track = ask_kafka(settings, serving_track(settings.kafka, TopicNames.of(settings.topics)), ABOUT)
    return settings.model_copy(update={"snapshots": settings.snapshots.on_track(track)})


def stored_settings(*versions: int) -> Settings:
    """The settings for a command that reads only the store: on the track that is named, or else on that of these versions.

    Raises:
        StreamError: a version isn't of `main`, and the registry can't be read.
        RegistryError: the versions are of two tracks.
    """
    from deploy.settings import load_settings
    from state.tracks import numbers_before

    settings = with_track(load_settings())
    if settings.snapshots.track or not any(map(numbers_before, versions)):
        return settings
    from state.track_decisions import tracks_by_number
    from stream.errors import RegistryError
    from stream.registry.log import read_registry
    from stream.topics.names import TopicNames

    state = ask_kafka(settings, read_registry(settings.kafka, TopicNames.of(settings.topics)), ABOUT)
    firsts = {numbers_before(version) for version in versions}
    found = [track.name for track in tracks_by_number(state) if track.first_number in firsts]
    if len(found) != 1 or len(firsts) != 1:
        raise RegistryError(
            f"versions {', '.join(map(str, versions))}: expected versions of one track, found {', '.join(found) or 'none'}. "
            "`headrace model compare` lists the tracks."
        )
    return settings.model_copy(update={"snapshots": settings.snapshots.on_track(found[0])})


def require_serving(settings: Settings, what: str) -> None:
    """Raise RegistryError where another track serves than the one that is named.

    Args:
        what: what only the track that serves can have.
    """
    from stream.errors import RegistryError
    from stream.registry.track_operations import serving_track

    named = stored_settings().snapshots.track
    if not named:
        return
    track = ask_kafka(settings, serving_track(settings.kafka, topic_names(settings)), ABOUT)
    if track != named:
        raise RegistryError(
            f"track {named}: expected the track that serves for a {what}, found that {track} does. `headrace model shadow "
            f"{named} --share …` lets another track score requests."
        )


def settings_for(*versions: str) -> Settings:
    """The settings for versions by number or by alias: only for an alias the registry is asked which track serves."""
    if all(version.isascii() and version.isdigit() for version in versions):
        return stored_settings(*map(int, versions))
    return command_settings()


def topic_names(settings: Settings) -> TopicNames:
    """The names of the topics, of the settings' track."""
    from state.tracks import MAIN
    from stream.topics.names import TopicNames

    return TopicNames.of(settings.topics, settings.snapshots.track or MAIN)


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
        RegistryError: there is no such alias.
    """
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
