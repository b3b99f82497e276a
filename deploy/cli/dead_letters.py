"""`headrace dead-letters …`: look at records that couldn't be used, and send them again after a fix."""

from __future__ import annotations

import base64
import itertools
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option, who
from deploy.cli.tables import printable
from deploy.cli.times import MOMENT, clock

if TYPE_CHECKING:
    from deploy.settings import Settings
    from stream.letters.log import Wanted
    from stream.letters.replay import Replay
    from stream.records.dead_letter import Letter
    from stream.topics.names import TopicNames

__all__ = ["dead_letters"]

ABOUT = "dead letters"
SHOWN = 60  # characters of a key or an error text in a line of a list


@click.group("dead-letters")
def dead_letters() -> None:
    """Look at records that couldn't be used, and send them again after a fix.

    \b
    Examples:
      headrace dead-letters list                                    what there is, by source and reason
      headrace dead-letters show 0/17                               one letter, whole
      headrace dead-letters replay --reason late_impression --dry-run
      headrace dead-letters replay --reason late_impression --since 2h
    """


def _wanted_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose letters, as the arguments `reasons`, `sources`, `since_ms` and `until_ms`."""
    for option in (
        click.option(
            "--until", "until_ms", type=MOMENT, metavar="TIME", help="Arrived before this time, given as for --since."
        ),
        click.option(
            "--since",
            "since_ms",
            type=MOMENT,
            metavar="TIME",
            help="Arrived at this time or later: a time (UTC), or how long ago, such as 2h.",
        ),
        click.option(
            "--source",
            "sources",
            multiple=True,
            type=click.Choice(["impressions", "clicks", "examples", "score-requests"]),
            help="Only from this topic (without the prefix); repeatable.",
        ),
        click.option("--reason", "reasons", multiple=True, metavar="CODE", help="Only with this reason code; repeatable."),
    ):
        function = option(function)
    return function


@dead_letters.command("list")
@_wanted_options
@click.option("--last", type=click.IntRange(min=0), default=20, show_default=True, help="Newest letters shown; 0: all.")
@format_option
def list_(
    reasons: tuple[str, ...], sources: tuple[str, ...], since_ms: int | None, until_ms: int | None, last: int, output: str
) -> None:
    """Count the letters by source and reason, and list the newest. Never writes.

    \b
    Examples:
      headrace dead-letters list
      headrace dead-letters list --reason malformed_json --since 1h --last 100
      headrace dead-letters list --source clicks --format json
    """
    from stream.letters.log import LetterLog

    settings, names = _settings()
    wanted = _wanted(names, reasons, sources, since_ms, until_ms)

    # By partition, since letters are in the order of their arrival within one partition only.
    newest: dict[int, deque[tuple[Letter, bool]]] = defaultdict(lambda: deque(maxlen=last or None))
    letters: Counter[tuple[str, str]] = Counter()
    replayed: Counter[tuple[str, str]] = Counter()

    async def read() -> None:
        async with LetterLog(settings.kafka, names) as log:
            done = await log.replayed()
            async for letter in log.letters(wanted):
                what = letter.origin.topic, letter.reason
                letters[what] += 1
                replayed[what] += letter.origin in done
                newest[letter.partition].append((letter, letter.origin in done))

    ask_kafka(settings, read(), ABOUT)
    shown = sorted(itertools.chain(*newest.values()), key=lambda each: (each[0].arrived_ms, each[0].partition, each[0].offset))
    if last:
        shown = shown[-last:]
    totals = [
        {"source": source, "reason": reason, "letters": count, "replayed": replayed[source, reason]}
        for (source, reason), count in sorted(letters.items())
    ]
    if output == "json":
        echo_json({"totals": totals, "letters": [_document(letter) | {"replayed": done} for letter, done in shown]})
        return
    for letter, done in shown:
        key = "-" if letter.key is None else _short(letter.key)
        click.echo(
            f"{letter.name:>10}  {clock(letter.arrived_ms)}  {letter.reason:16}  {letter.origin!s:24}  key {key}  "
            f"{_short(letter.error.encode())}{'  (replayed)' if done else ''}"
        )
    for total in totals:
        click.echo(f"{total['letters']:>10,} {total['source']} {total['reason']}, {total['replayed']:,} of them replayed")
    if not totals:
        click.echo("no dead letters")


@dead_letters.command()
@click.argument("name", metavar="PARTITION/OFFSET")
@click.option("--raw", is_flag=True, help="Print only the record's value, byte for byte.")
@format_option
def show(name: str, raw: bool, output: str) -> None:
    """Show one letter whole: its reason and its source, and key, headers and value as received.

    \b
    Examples:
      headrace dead-letters show 0/17
      headrace dead-letters show 0/17 --raw > record.json
    """
    from stream.letters.log import LetterLog

    partition, offset = _offset_of(name)
    settings, names = _settings()

    async def read() -> Letter:
        async with LetterLog(settings.kafka, names) as log:
            return await log.letter(partition, offset)

    letter = ask_kafka(settings, read(), ABOUT)
    if raw:
        sys.stdout.buffer.write(letter.value or b"")
    elif output == "json":
        echo_json(_document(letter) | _bytes("value", letter.value) | {"headers": [_header(*each) for each in letter.headers]})
    else:
        rows = [
            ("place", f"{names.dead_letters} {letter.name}"),
            ("arrived", clock(letter.arrived_ms)),
            ("reason", letter.reason),
            ("path", _text(letter.path.encode())),
            ("error", _text(letter.error.encode())),
            ("source", str(letter.origin)),
            ("key", "-" if letter.key is None else _text(letter.key)),
            *((f"header {_text(header.encode())}", _text(value or b"")) for header, value in letter.headers),
            ("value", _value(letter)),
        ]
        for title, value in rows:
            click.echo(f"{title:8} {value}")


@dead_letters.command()
@click.argument("chosen", nargs=-1, metavar="[PARTITION/OFFSET]...")
@_wanted_options
@click.option("--all", "everything", is_flag=True, help="Every letter; required when no other option chooses letters.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@format_option
def replay(
    chosen: tuple[str, ...],
    reasons: tuple[str, ...],
    sources: tuple[str, ...],
    since_ms: int | None,
    until_ms: int | None,
    everything: bool,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Send records again to the topic and partition they came from, bytes as received. No record is sent twice.

    Safe to repeat, and to run again after it was killed halfway: the transaction that sends records also writes a receipt. A
    record that fails again becomes a new letter, which can be replayed after the next fix. Exit code 1 when some could not be
    sent.

    \b
    Examples:
      headrace dead-letters replay --reason late_impression --dry-run
      headrace dead-letters replay --reason not_finite --source examples --since 2024-05-01T12:00:00Z
      headrace dead-letters replay 0/17 3/4
      headrace dead-letters replay --all --yes --format json
    """
    from stream.letters.replay import plan_replay, replay_letters

    if not (chosen or reasons or sources or everything or since_ms is not None or until_ms is not None):
        raise click.UsageError("expected PARTITION/OFFSET, --reason, --source, --since, --until or --all, found none of them.")
    settings, names = _settings()
    wanted = _wanted(names, reasons, sources, since_ms, until_ms, tuple(map(_normal, chosen)))
    if dry_run or (not yes and sys.stdin.isatty()):
        planned = ask_kafka(settings, plan_replay(settings.kafka, names, wanted), ABOUT)
        if dry_run:
            _show_replay(planned, names, output, dry_run=True)
            return
        click.confirm(f"Send {planned.fed.total():,} records again ({_sum(planned.fed)})?", abort=True, err=True)
    done = ask_kafka(settings, replay_letters(settings.kafka, names, wanted, who=who()), ABOUT)
    _show_replay(done, names, output, dry_run=False)
    if done.too_large or done.foreign or done.without_bytes:
        sys.exit(1)


def _show_replay(replay: Replay, names: TopicNames, output: str, *, dry_run: bool) -> None:
    if output == "json":
        echo_json(
            {
                "fed": [
                    {"source": source, "reason": reason, "records": count}
                    for (source, reason), count in sorted(replay.fed.items())
                ],
                "done_before": replay.done_before.total(),
                "foreign": [letter.name for letter in replay.foreign],
                "too_large": [letter.name for letter in replay.too_large],
                "without_bytes": [letter.name for letter in replay.without_bytes],
                "dry_run": dry_run,
            }
        )
    else:
        for (source, reason), count in sorted(replay.fed.items()):
            click.echo(f"{count:>10,} {source} {reason}")
        click.echo(
            f"{'would send' if dry_run else 'sent'} {replay.fed.total():,} records again{' (dry run)' if dry_run else ''}"
        )
        if replay.done_before:
            click.echo(
                f"{replay.done_before.total():,} letters were replayed before, or are another letter of a record that was"
            )
    for letter in replay.foreign:
        click.echo(
            f"{letter.name}: expected a source with the prefix {names.prefix!r} and that partition, found {letter.origin}. It "
            f"can't be sent again; `headrace dead-letters show {letter.name} --raw` gives its bytes.",
            err=True,
        )
    for letter in replay.too_large:
        click.echo(
            f"{letter.name}: {letter.origin.topic} rejected it for its size ({letter.size:,} bytes, and a header that a replay "
            "adds). Raise topics.max_message_bytes, `headrace topics create --mend`, and replay again.",
            err=True,
        )

    for letter in replay.without_bytes:
        click.echo(
            f"{letter.name}: a letter {letter.reason} has no bytes to send again. They are at {letter.origin} while retention "
            f"keeps them: {_way_out(letter)}.",
            err=True,
        )


def _way_out(letter: Letter) -> str:
    if letter.reason == "too_large":
        return "send that event again with fewer or shorter features, or raise topics.max_message_bytes first"
    return "send these events again in smaller batches"


def _value(letter: Letter) -> str:
    if letter.source_size is not None:
        return f"- (left out: {letter.source_size:,} bytes are at {letter.origin} while retention keeps them)"
    return "-" if letter.value is None else _text(letter.value)


def _document(letter: Letter) -> dict[str, Any]:
    return {
        "place": letter.name,
        "arrived_ms": letter.arrived_ms,
        "reason": letter.reason,
        "path": letter.path,
        "error": letter.error,
        "source": letter.origin._asdict(),
        "source_size": letter.source_size,
        **_bytes("key", letter.key),
    }


def _header(name: str, value: bytes | None) -> dict[str, Any]:
    return {"name": name, **_bytes("value", value)}


def _bytes(name: str, data: bytes | None) -> dict[str, Any]:
    """Bytes for JSON: as text where they are UTF-8, else in base64 under another name."""
    if data is None:
        return {name: None}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def _text(data: bytes) -> str:
    """Bytes as one line for people; control characters and bytes that aren't UTF-8 are escaped."""
    return printable(data.decode(errors="backslashreplace"))


def _short(data: bytes) -> str:
    line = _text(data)
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def _sum(counts: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{count:,} {source} {reason}" for (source, reason), count in sorted(counts.items())) or "none"


def _offset_of(name: str) -> tuple[int, int]:
    """The partition and the offset that a letter's name consists of."""
    partition, slash, offset = name.partition("/")
    if not (slash and partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()):
        raise click.UsageError(
            f"{name!r}: expected PARTITION/OFFSET such as 0/17, as `headrace dead-letters list` shows in its first column."
        )
    return int(partition), int(offset)


def _normal(name: str) -> str:
    """A letter's name without leading zeros, as `Letter.name` has it."""
    partition, offset = _offset_of(name)
    return f"{partition}/{offset}"


def _wanted(
    names: TopicNames,
    reasons: tuple[str, ...],
    sources: tuple[str, ...],
    since_ms: int | None,
    until_ms: int | None,
    chosen: tuple[str, ...] = (),
) -> Wanted:
    from stream.letters.log import Wanted
    from stream.records.dead_letter import REASONS

    for reason in reasons:
        if reason not in REASONS:
            raise click.UsageError(f"--reason {reason!r}: expected one of {', '.join(REASONS)}.")
    full = frozenset(f"{names.prefix}{source}" for source in sources)
    return Wanted(frozenset(reasons), full, frozenset(chosen), since_ms, until_ms)


def _settings() -> tuple[Settings, TopicNames]:
    from deploy.settings import load_settings
    from stream.topics.names import TopicNames

    settings = load_settings()
    return settings, TopicNames.of(settings.topics)
