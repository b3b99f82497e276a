"""The options of `replay` and `data schema` that say what a file's columns are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deploy.datasets import Columns, DataSet
    from deploy.settings import Settings

__all__ = ["mapped_columns", "mapping_options", "open_mapped"]

_ROLES = ("id", "timestamp", "clicked", "click_timestamp", "user", "item", "score", "model_version", "delta")


def _mapping(context: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str | None]:
    mapped: dict[str, str | None] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if not equals or role not in _ROLES:
            raise click.BadParameter(f"expected ROLE=COLUMN with ROLE one of {', '.join(_ROLES)}, found {pair!r}.")
        if role in mapped:
            raise click.BadParameter(f"expected one column for each role, found {role} twice. Leave one out.")
        mapped[role] = column or None
    return mapped


def mapping_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --path, --column, --candidate-feature, --drop, --text and --unit, as the arguments of `open_mapped`."""
    for option in reversed(
        (
            click.option(
                "--path",
                type=click.Path(path_type=Path),
                help="The file (jsonl, parquet, csv, tsv), or the folder of a named data set.",
            ),
            click.option(
                "--column",
                "roles",
                multiple=True,
                callback=_mapping,
                metavar="ROLE=COLUMN",
                help=f"For files: the column of a role, one of {', '.join(_ROLES)}. ROLE= says that no column has it.",
            ),
            click.option(
                "--candidate-feature", "own", multiple=True, metavar="COLUMN", help="For files: a feature of the item shown."
            ),
            click.option("--drop", multiple=True, metavar="COLUMN", help="For files: a column to leave out."),
            click.option(
                "--text",
                multiple=True,
                metavar="COLUMN",
                help="For csv and tsv: a column that stays text, even if its values look like numbers.",
            ),
            click.option(
                "--unit",
                type=click.Choice(["s", "ms", "us", "ns"]),
                default="ms",
                show_default=True,
                help="For files: the unit of times that are numbers.",
            ),
        )
    ):
        function = option(function)
    return function


def open_mapped(
    name: str,
    *,
    path: Path | None,
    seed: int = 0,
    settings: Settings | None = None,
    **mapping: Any,
) -> DataSet:
    """The data set that the options name; `settings` have the pipeline's limits.

    Raises:
        click.UsageError: options for files together with a named data set, or a column with a role is dropped.
        DataSetError: there is no such data set.
    """
    from deploy.datasets import Limits, open_data_set

    columns = mapped_columns(name, **mapping)
    limits = Limits() if settings is None else Limits(settings.topics.max_message_bytes, settings.join.max_future_ms)
    return open_data_set(name, seed=seed, path=path, columns=columns, limits=limits)


def mapped_columns(
    name: str, *, roles: dict[str, str | None], own: tuple[str, ...], drop: tuple[str, ...], text: tuple[str, ...], unit: str
) -> Columns:
    """What the options say of a file's columns.

    Raises:
        click.UsageError: options for files together with a named data set, or a column with a role is dropped.
    """
    from deploy.datasets import FILE_KINDS, Columns

    if (roles or own or drop) and name not in FILE_KINDS:
        raise click.UsageError(
            f"--column, --candidate-feature, --drop: expected one of {', '.join(FILE_KINDS)}, found {name}. "
            "Leave these options out."
        )
    if text and name not in ("csv", "tsv"):
        raise click.UsageError(f"--text: expected csv or tsv, found {name}, which has types of its own. Leave it out.")
    if both := sorted({column for column in (*roles.values(), *own) if column} & set(drop)):
        raise click.UsageError(
            f"--drop: expected columns that have no role, found {both[0]}. Leave out one of the two options."
        )
    mapped: dict[str, Any] = dict(roles)
    return Columns(**mapped, candidate=own, drop=frozenset(drop), text=frozenset(text), unit=unit)
