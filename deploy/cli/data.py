"""`headrace data`: listing and fetching data sets."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click

from deploy.cli.common import echo_document, echo_json, format_option
from deploy.cli.mapping import mapping_options, open_mapped

__all__ = ["data"]


@click.group()
def data() -> None:
    """List data sets, fetch them, and print their feature schemas.

    Data sets are looked for in HEADRACE_DATA_DIR, then in data/, then in the user's cache.

    \b
    Examples:
      headrace data list
      headrace data fetch movielens-100k
      headrace data schema kuairand >> headrace.toml
    """


@data.command(name="list")
@format_option
def list_(output: str) -> None:
    """List the data sets: where each is on this machine, its terms, and where its click times come from.

    \b
    Examples:
      headrace data list
      headrace data list --format json
    """
    from deploy.datasets import NAMED, open_data_set

    sets = [open_data_set(name) for name in NAMED]
    if output == "json":
        shown = [
            {
                "name": one.name,
                "title": one.title,
                "path": str(path) if (path := one.find()) else None,
                "terms": one.terms,
                "clicks": one.clicks,
                "obtain": one.obtain,
            }
            for one in sets
        ]
        echo_json(shown)
        return
    for one in sets:
        where = one.find()
        click.echo(f"{click.style(one.name, bold=True)}  {one.title}")
        lines = [("here", str(where)) if where else ("get it", one.obtain), ("clicks", one.clicks), ("terms", one.terms)]
        for label, text in lines:
            click.echo(textwrap.fill(text, 110, initial_indent=f"  {label:8}", subsequent_indent=" " * 10))
        click.echo()
    click.echo("Your own files: headrace replay jsonl|parquet|csv|tsv --path FILE (see headrace replay --help).", err=True)


@data.command()
@click.argument("name")
@click.option(
    "--archive",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that you have downloaded: the authors' archive (kuairand) or the wheel (movielens-100k, open-bandit).",
)
@format_option
def fetch(name: str, archive: Path | None, output: str) -> None:
    """Put a data set into the user's cache, unless it is there already, and print its folder.

    \b
    Examples:
      headrace data fetch movielens-100k
      headrace data fetch kuairand --archive KuaiRand-Pure.tar.gz
    """
    from deploy.datasets import FILE_KINDS, open_data_set
    from deploy.errors import DataSetError

    if archive is not None and not archive.is_file():
        raise DataSetError(f"--archive: expected a file, found nothing at {archive}. Correct the path.")
    one = open_data_set(name, path=None) if name not in FILE_KINDS else None
    if one is None:
        raise DataSetError(f"{name}: expected a named data set, found a file format. Use: headrace replay {name} --path FILE")
    where = one.find()
    if where is None or archive is not None:
        where = one.fetch(lambda text: click.echo(text, err=True), archive)
    click.echo(textwrap.fill(f"Terms: {one.terms}", 110), err=True)
    if output == "json":
        echo_json({"name": one.name, "path": str(where), "terms": one.terms})
    else:
        click.echo(str(where))


@data.command()
@click.argument("name")
@mapping_options
@format_option
def schema(name: str, output: str, **mapping: Any) -> None:
    """Print a data set's feature schema as TOML for headrace.toml. The name `simulation` stands for `headrace simulate`.

    For a file, pass the same options as to `headrace replay`: a column that is mapped to a role or dropped is not a feature.

    \b
    Examples:
      headrace data schema movielens-100k >> headrace.toml
      headrace data schema simulation
      headrace data schema csv --path log.csv --column timestamp=shown_at --unit s --drop session
    """
    from deploy.feeding.simulation import simulation_schema

    chosen = simulation_schema() if name == "simulation" else open_mapped(name, **mapping).schema()
    if output == "json":
        echo_json(chosen.model_dump(mode="json"))
        return
    echo_document(f"[features]\nembedding_dim = {chosen.embedding_dim}\nfields = [")
    for field in chosen.fields:
        given = field.model_dump(mode="json", exclude_defaults=True)
        echo_document(f"  {{ {', '.join(f'{key} = {_toml(value)}' for key, value in given.items())} }},")
    echo_document("]")


def _toml(value: Any) -> str:
    import msgspec

    # TOML writes strings and numbers as JSON does, except that it escapes DEL.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
