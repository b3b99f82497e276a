"""`headrace snapshot alias …`, `tag` and `history`: names for versions, notes on them, and who moved what when and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option, on_named_track
from deploy.cli.snapshot_common import (
    ABOUT,
    command_settings,
    operations_of,
    reason_option,
    resolve,
    topic_names,
    version_argument,
)

if TYPE_CHECKING:
    from state.alias_decisions import AliasMoved
    from state.registry import RegistryState

__all__ = ["alias", "history", "tag"]


@click.group()
def alias() -> None:
    """Point names at versions. A version that an alias points at is never deleted.

    Scorers follow `champion` only, which `promote` and `rollback` move.

    \b
    Examples:
      headrace snapshot alias set candidate 42 --reason "better on the hold-out"
      headrace snapshot alias list
      headrace snapshot alias rm candidate --reason "lost the comparison"
    """


@alias.command("set")
@click.argument("name")
@version_argument
@reason_option
@click.option("--unchecked", is_flag=True, help="Don't check first that the store has the version.")
@format_option
def set_(name: str, version: str, reason: str, unchecked: bool, output: str) -> None:
    """Point the alias NAME at VERSION, a number or another alias. A name that isn't there yet is made.

    \b
    Examples:
      headrace snapshot alias set candidate 42 --reason "better on the hold-out"
      headrace snapshot alias set before-sale champion --reason "to compare with"
    """
    settings = command_settings()
    (number,) = resolve(settings, version)
    moved = ask_kafka(settings, operations_of(settings, unchecked=unchecked).set_alias(name, number, reason), ABOUT)
    _show_moved(moved, output)


@alias.command("rm")
@click.argument("name")
@reason_option
@format_option
def remove(name: str, reason: str, output: str) -> None:
    """Remove the alias NAME. Its history stays, and the version too until it is deleted.

    \b
    Examples:
      headrace snapshot alias rm candidate --reason "lost the comparison"
    """
    settings = command_settings()
    _show_moved(ask_kafka(settings, operations_of(settings).remove_alias(name, reason), ABOUT), output)


@alias.command("list")
@format_option
def list_(output: str) -> None:
    """List the aliases: where each points, who moved it last, when and why.

    \b
    Examples:
      headrace snapshot alias list
      headrace snapshot alias list --format json
    """
    from deploy.cli.tables import print_table
    from deploy.cli.times import clock

    state = _registry()
    champion = state.champion
    rows: list[dict[str, Any]] = [
        {"alias": name, "version": each.version, "who": each.who, "at_ms": each.at_ms, "reason": each.reason}
        for name, each in sorted(state.aliases.items())
        if each.version is not None
    ]
    if champion.version is not None:
        rows.insert(
            0,
            {
                "alias": "champion",
                "version": champion.version,
                "who": champion.who,
                "at_ms": champion.at_ms,
                "reason": champion.reason,
            },
        )
    if output == "json":
        echo_json({"aliases": rows})
        return
    if not rows:
        click.echo("no alias yet: `headrace snapshot alias set NAME VERSION --reason …` makes one")
        return
    print_table(
        ("alias", "version", "since (UTC)", "who", "why"),
        [[row["alias"], str(row["version"]), clock(row["at_ms"]), row["who"], row["reason"]] for row in rows],
        right=("version",),
    )


@click.command()
@version_argument
@click.argument("tags", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--remove", multiple=True, metavar="KEY", help="Remove this tag; may be given several times.")
@click.option("--reason", default="", help="Why; it stays in the registry.")
@format_option
def tag(version: str, tags: tuple[str, ...], remove: tuple[str, ...], reason: str, output: str) -> None:
    """Put tags on VERSION, a number or an alias, change or remove them. Without any, show them.

    A version with a tag is never deleted. `good` is no such tag: the trainer sets it.

    \b
    Examples:
      headrace snapshot tag 41 ticket=CTR-17 note="before the sale"
      headrace snapshot tag 41 --remove note
      headrace snapshot tag 41
    """
    values: dict[str, str] = {}
    for each in tags:
        name, separator, value = each.partition("=")
        if not separator:
            raise click.UsageError(f"{each!r}: expected KEY=VALUE, found no `=`.")
        values[name] = value
    both = sorted(values.keys() & set(remove))
    if both:
        raise click.UsageError(f"{both[0]}: expected it as KEY=VALUE or with --remove, found both.")
    settings = command_settings()
    (number,) = resolve(settings, version)
    changed: tuple[str, ...] = ()
    if values or remove:
        done = ask_kafka(settings, operations_of(settings).tag(number, values, reason, remove=remove), ABOUT)
        found, changed = done.tags, done.changed
    else:
        found = _registry().tags_of(number)
    if output == "json":
        from deploy.cli.snapshot_view import tagged_json

        echo_json({"version": number, "tagged": tagged_json(found), "changed": changed})
        return
    from deploy.cli.tables import print_table
    from deploy.cli.times import clock

    if not found:
        click.echo(f"version {number} has no tags")
    else:
        print_table(
            ("tag", "value", "since (UTC)", "who", "why"),
            [[name, each.value or "", clock(each.at_ms), each.who, each.reason] for name, each in found.items()],
        )
    if (values or remove) and not changed:
        click.echo("It was so already; nothing was written.")


@click.command()
@click.argument("name", metavar="[ALIAS]", default="champion")
@click.option("--last", type=click.IntRange(min=0), default=20, show_default=True, help="Latest moves shown; 0: all known.")
@format_option
def history(name: str, last: int, output: str) -> None:
    """Show who moved ALIAS, when and why, latest first. By default the champion.

    The registry keeps the last 20 moves of an alias, and of the champion also the last 20 by hand. Of the champion's older
    automatic moves it keeps those of versions that aren't deleted.

    \b
    Examples:
      headrace snapshot history
      headrace snapshot history candidate --format json
    """
    from deploy.cli.tables import print_table
    from deploy.cli.times import clock
    from stream.errors import RegistryError

    state = _registry()
    moves = _champion_moves(state) if name == "champion" else _alias_moves(state, name)
    if moves is None:
        there = ", ".join(["champion", *sorted(state.aliases)])
        raise RegistryError(f"alias {name}: expected an alias with a history, found none of that name (there are: {there}).")
    moves = moves[-last:] if last else moves
    if output == "json":
        echo_json({"alias": name, "moves": moves})
        return
    print_table(
        ("at (UTC)", "from", "to", "how", "who", "why"),
        [
            [clock(move["at_ms"]), _number(move["from"]), _number(move["to"]), move["how"], move["who"], move["reason"]]
            for move in reversed(moves)
        ],
        right=("from", "to"),
    )


def _champion_moves(state: RegistryState) -> list[dict[str, Any]]:
    """Moves of the champion, oldest first: those in its record, and the times that versions' records have besides."""
    moves = [
        {
            "at_ms": move.at_ms,
            "from": move.previous,
            "to": move.version,
            "how": move.how,
            "who": move.who,
            "reason": move.reason,
        }
        for move in state.champion.moves
    ]
    known = {move.at_ms for move in state.champion.moves}
    moves += [
        {"at_ms": at_ms, "from": None, "to": record.version, "how": "auto", "who": record.who, "reason": record.gate}
        for record in state.versions.values()
        for at_ms in record.champion_at_ms
        if at_ms not in known
    ]
    return sorted(moves, key=lambda move: move["at_ms"] or 0)


def _alias_moves(state: RegistryState, name: str) -> list[dict[str, Any]] | None:
    record = state.aliases.get(name)
    if record is None:
        return None
    return [
        {
            "at_ms": move.at_ms,
            "from": move.previous,
            "to": move.version,
            "how": "removed" if move.version is None else "set",
            "who": move.who,
            "reason": move.reason,
        }
        for move in record.moves
    ]


def _show_moved(moved: AliasMoved, output: str) -> None:
    if output == "json":
        echo_json(
            {
                "alias": moved.name,
                "from": moved.previous,
                "to": moved.version,
                "changed": moved.changed,
                "undo": moved.undo and on_named_track(moved.undo),
            }
        )
        return
    click.echo(f"{moved.name}: {_number(moved.previous)} → {_number(moved.version)}")
    click.echo(f"undo: {on_named_track(moved.undo or '')}" if moved.changed else "It was so already; nothing was written.")


def _number(version: int | None) -> str:
    return "none" if version is None else str(version)


def _registry() -> RegistryState:
    from stream.registry.log import read_registry

    settings = command_settings()
    return ask_kafka(settings, read_registry(settings.kafka, topic_names(settings)), ABOUT)
