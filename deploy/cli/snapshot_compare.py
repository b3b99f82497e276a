"""`headrace snapshot diff` and `export`: what changed between two versions, and a version for other servers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import echo_json, format_option
from deploy.cli.snapshot_common import resolve, settings_for

if TYPE_CHECKING:
    from state.version_diff import Distance, VersionDiff

__all__ = ["diff", "export"]


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@format_option
def diff(before: str, after: str, output: str) -> None:
    """Show what changed from version A to version B: rows, weights by field, metrics, settings. Each is a number or an alias.

    Reads both versions whole. It needs 24 bytes of memory for each row of A, and room for A's embeddings in the folder for
    temporary files (TMPDIR).

    Norms are Euclidean. By field there are the average row, which unknown values read, and the weights of the MLP that read the
    field; a row doesn't say which field it is of.

    \b
    Examples:
      headrace snapshot diff 41 42
      headrace snapshot diff champion candidate --format json
    """
    from state.store import SnapshotStore
    from state.version_diff import compare

    settings = settings_for(before, after)
    versions = resolve(settings, before, after)
    store = SnapshotStore(settings.snapshots)
    found = compare(*(store.read(version) for version in versions))
    if output == "json":
        echo_json(_diff_json(versions, found))
    else:
        _print_diff(versions, found)


@click.command()
@click.argument("version")
@click.option(
    "--onnx", "file", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE", help="Write here."
)
@format_option
def export(version: str, file: Path, output: str) -> None:
    """Write VERSION, a number or an alias, as an ONNX model for servers that aren't Headrace's.

    Its inputs are keys of feature values, -1 for a missing value; its output `scores` has a click probability for each row.
    The model's metadata has the fields in the order of the inputs. docs/operations.md says how keys are made. Tables of more
    than 256 MB go to a second file, FILE.data.

    \b
    Examples:
      headrace snapshot export 41 --onnx model.onnx
      headrace snapshot export champion --onnx model.onnx --format json
    """
    from deploy.errors import DeployError
    from model.errors import ModelError
    from model.onnx_export import export_onnx
    from model.schema import FeatureSchema
    from model.settings import ModelSettings
    from state.errors import SnapshotCorrupt
    from state.store import SnapshotStore

    for path in (file, file.with_name(file.name + ".data")):
        if path.exists():
            raise DeployError(f"{path}: expected no file, found one. Remove it, or choose another name.")
    settings = settings_for(version)
    (number,) = resolve(settings, version)
    reader = SnapshotStore(settings.snapshots).read(number)
    manifest = reader.manifest
    try:
        schema = FeatureSchema.model_validate(manifest.features)
        model = ModelSettings.of_version(manifest.model)
    except ValueError as error:
        raise SnapshotCorrupt(
            f"version {number}: expected the features and the model of this release in its manifest, found: {error}. Export it "
            "with the release that wrote it."
        ) from error
    about = {"version": str(number), "chain": manifest.chain, "digest": manifest.digest, "schema_hash": manifest.schema_hash}
    try:
        done = export_onnx(file, schema, model, reader.dense(), reader.rows, negative_rate=manifest.negative_rate, about=about)
    except BaseException as error:
        for path in (file, file.with_name(file.name + ".data")):
            path.unlink(missing_ok=True)
        if isinstance(error, ModelError):
            raise type(error)(f"version {number}: {error}") from error
        raise
    sizes = {str(path): path.stat().st_size for path in done.files}
    if output == "json":
        echo_json({"version": number, "files": sizes, "rows": done.rows, "inputs": done.inputs, "output": "float32 (batch)"})
        return
    for name, size in sizes.items():
        click.echo(f"{name}: {size:,} bytes")
    click.echo(f"version {number}, {done.rows:,} rows")
    for name, shape in done.inputs.items():
        click.echo(f"input  {name}: {shape}")
    click.echo("output scores: float32 (batch)")


def _diff_json(versions: list[int], found: VersionDiff) -> dict[str, Any]:
    rows = dataclasses.asdict(found.rows) | {"same": found.rows.same}
    return {
        "before": versions[0],
        "after": versions[1],
        "rows": {name: _finite(value) for name, value in rows.items()},
        "fields": [dataclasses.asdict(field) for field in found.fields],
        "dense": {name: dataclasses.asdict(distance) for name, distance in found.dense.items()},
        "metrics": {
            name: {"before": _finite(before), "after": _finite(after)} for name, (before, after) in found.metrics.items()
        },
        "settings": {name: {"before": before, "after": after} for name, (before, after) in found.settings.items()},
    }


def _print_diff(versions: list[int], found: VersionDiff) -> None:
    from deploy.cli.snapshot_view import is_count
    from deploy.cli.tables import print_pairs, print_table

    rows = found.rows
    print_pairs(
        [
            ("rows", f"{rows.before:,} → {rows.after:,}"),
            ("added, gone", f"{rows.added:,}, {rows.gone:,}"),
            ("changed, same", f"{rows.changed:,}, {rows.same:,}"),
            ("norm of a row", f"{_shown(rows.norm_before)} → {_shown(rows.norm_after)} (root mean square)"),
            ("its change", f"{_shown(rows.change)} (root mean square of the changed rows), {_shown(rows.change_max)} at most"),
        ],
        f"version {versions[0]} → {versions[1]}",
    )
    columns = ("before", "after", "change")
    if found.fields:
        click.echo()
        names = ("field", *(f"row {name}" for name in columns), *(f"input {name}" for name in columns))
        print_table(names, [[each.field, *_norms(each.row), *_norms(each.input)] for each in found.fields], right=names[1:])
    click.echo()
    print_table(("weights", *columns), [[name, *_norms(distance)] for name, distance in found.dense.items()], right=columns)
    if found.metrics:
        click.echo()
        print_table(
            ("metric", *columns),
            [
                [
                    name,
                    *(
                        _shown(each, count=is_count(name))
                        for each in (before, after, None if before is None or after is None else after - before)
                    ),
                ]
                for name, (before, after) in found.metrics.items()
            ],
            right=columns,
        )
    if found.settings:
        click.echo()
        print_table(("differs", "before", "after"), [[name, before, after] for name, (before, after) in found.settings.items()])


def _norms(distance: Distance) -> list[str]:
    return [_shown(each) for each in (distance.before, distance.after, distance.change)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shown(value: float | None, *, count: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if count else f"{value:.4g}"
