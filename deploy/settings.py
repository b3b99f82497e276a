"""The one settings tree. Precedence: arguments > environment `HEADRACE_*` > `headrace.toml` > defaults.

```sh
HEADRACE_KAFKA__BOOTSTRAP_SERVERS=broker:9092 headrace run join     # `__` goes one level down
HEADRACE_CONFIG=/etc/headrace.toml headrace config check            # another file than ./headrace.toml
```

Relative paths (`snapshots.url`, `state_dir`, `local_kafka.dir`) lie beside the settings file, wherever a worker is started: one
that is started in another folder must not find an empty store there. They are absolute once loaded, as `headrace config show`
prints them.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from deploy.errors import ConfigError
from model.schema import FeatureSchema
from model.settings import ModelSettings
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

__all__ = ["LocalKafkaSettings", "Settings", "load_settings", "settings_file"]

DEFAULT_FILE = Path("headrace.toml")


class LocalKafkaSettings(BaseModel):
    """The Apache Kafka that `headrace kafka start` runs on this machine.

    ```toml
    [local_kafka]
    dir = ".headrace/kafka"  # data, logs and the ports it chose
    resolver = "jgo"         # jgo (no Maven needed) or mvn
    heap_mb = 512
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: Path = Field(
        default=Path(".headrace/kafka"),
        description="Data, logs and the ports chosen; a relative path lies beside the settings file.",
    )
    resolver: Literal["jgo", "mvn"] = "jgo"
    cache_dir: Path | None = Field(default=None, description="Where jars are kept; ~/.cache/headrace/kafka when unset.")
    java: Path | None = Field(default=None, description="A java binary, 17 or newer; found by itself when unset.")
    heap_mb: int = Field(default=512, ge=128)
    start_timeout_ms: int = Field(default=60_000, ge=1_000)


class Settings(BaseSettings):
    """Every setting of Headrace; each part documents its own."""

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
    snapshots: SnapshotSettings = SnapshotSettings()
    local_kafka: LocalKafkaSettings = LocalKafkaSettings()
    state_dir: Path = Field(
        default=Path(".headrace/state"),
        description="RocksDB of the join, one volume a worker; a relative path lies beside the settings file.",
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


# Read by Headrace, but not settings: which file to read, and where data sets are looked for.
NOT_SETTINGS = {"HEADRACE_CONFIG", "HEADRACE_DATA_DIR"}


def settings_file() -> Path:
    """The file that settings are read from; it need not exist."""
    return Path(os.environ.get("HEADRACE_CONFIG", DEFAULT_FILE))


def load_settings(**overrides: Any) -> Settings:
    """Read the whole tree.

    Raises:
        ConfigError: a file that is missing or not TOML, an unknown key, or a value of the wrong kind; it names the key,
            where it came from, what was expected and what was found.
    """
    file = settings_file()
    if "HEADRACE_CONFIG" in os.environ and not file.is_file():
        raise ConfigError(f"HEADRACE_CONFIG: expected a file, found nothing at {file}. Make it, or unset the variable.")
    known = {name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        if variable.startswith("HEADRACE_") and variable not in NOT_SETTINGS:
            section = variable.removeprefix("HEADRACE_").split("__")[0].upper()
            if section not in known:
                raise ConfigError(
                    f"environment {variable}: unknown section {section.lower()!r}, expected one of "
                    f"{', '.join(sorted(Settings.model_fields))}. Unset it, or see `headrace config show`."
                )
    try:
        return _handed_down(_absolute(Settings(**overrides)))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: expected TOML, found: {error}. Mend the file.") from error
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}{_found(problem)}"
            for problem in error.errors()
        ]
        raise ConfigError(
            "settings (arguments > environment HEADRACE_* > "
            f"{file}):\n  " + "\n  ".join(lines) + "\nMend the key named; `headrace config show` prints every key."
        ) from error


def _absolute(settings: Settings) -> Settings:
    """With relative paths resolved against the folder of the settings file (the working folder where there is none)."""
    beside = settings_file().absolute().parent
    snapshots, local = settings.snapshots, settings.local_kafka
    if "://" not in snapshots.url:
        snapshots = snapshots.model_copy(update={"url": str(beside / Path(snapshots.url).expanduser())})
    local = local.model_copy(update={"dir": beside / local.dir.expanduser()})
    state_dir = beside / settings.state_dir.expanduser()
    return settings.model_copy(update={"snapshots": snapshots, "local_kafka": local, "state_dir": state_dir})


def _handed_down(settings: Settings) -> Settings:
    """With the section `schema_registry` given to the part that reads events by it."""
    return settings.model_copy(update={"join": settings.join.with_registry(settings.schema_registry)})


def _found(problem: Any) -> str:
    """What stood there; nothing for a whole section, of which the message itself says what is wrong."""
    if isinstance(problem["input"], dict):
        return ""
    secret = any(word in str(part) for part in problem["loc"] for word in ("password", "token"))
    secret |= re.search(r"://[^/]*@", str(problem["input"])) is not None  # an address with a login in it
    return ", found a secret" if secret else f", found {problem['input']!r}"
