"""`headrace config`: prints the settings and checks them."""

from __future__ import annotations

import click
import msgspec

from deploy.cli.common import echo_json, format_option

__all__ = ["config"]


@click.group()
def config() -> None:
    """Print every setting with its source, and check that the settings work together.

    \b
    Examples:
      headrace config show
      headrace config check
      HEADRACE_CONFIG=/etc/headrace.toml headrace config show --format json
    """


@config.command()
@click.option("--set", "only_set", is_flag=True, help="Only settings that are not at their default.")
@format_option
def show(only_set: bool, output: str) -> None:
    """Print every key with its value and source (default, file or environment). Secrets are masked.

    \b
    Examples:
      headrace config show
      headrace config show --set
      headrace config show --format json
    """
    from deploy.config_report import entries
    from deploy.settings import load_settings

    found = [entry for entry in entries(load_settings()) if not only_set or entry.source != "default"]
    if output == "json":
        echo_json(msgspec.to_builtins(found))
        return
    key_width = max((len(entry.key) for entry in found), default=0)
    for entry in found:
        value = "" if entry.value is None else msgspec.json.encode(entry.value).decode()
        click.echo(f"{entry.key:<{key_width}}  {entry.source:<11}  {value}".rstrip())


@config.command()
@format_option
def check(output: str) -> None:
    """Check each setting, and that the settings work together. Opens no connection. Exit code 1 when there is an error.

    \b
    Examples:
      headrace config check
      headrace config check --format json
    """
    from deploy.config_report import findings
    from deploy.settings import load_settings, settings_file

    found = findings(load_settings())
    errors = [finding for finding in found if finding.level == "error"]
    if output == "json":
        echo_json(msgspec.to_builtins(found))
    else:
        for finding in found:
            click.echo(f"{finding.level}: {finding.key}: {finding.message}")
        if not errors:
            file = settings_file()
            read = f"{file} and the environment" if file.is_file() else f"the environment alone: there is no {file}"
            click.echo(f"The settings are valid ({read}).")
    if errors:
        click.get_current_context().exit(1)
