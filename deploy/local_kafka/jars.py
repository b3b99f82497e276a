"""The jars that make up Apache Kafka: pinned in `kafka-jars.lock`, resolved by jgo or Maven, kept in a cache.

python -m deploy.local_kafka.jars 4.2.2     # write the lock again, for that version of Kafka

Other programs of Java have locks of their own in the same form, such as the S3 server of the tests: the first line names the
program.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import msgspec

from deploy.errors import LocalKafkaError
from deploy.settings import LocalKafkaSettings

__all__ = ["LOCK", "Jar", "cache_root", "in_utf8", "jars", "kafka_version", "read_lock", "write_lock"]

LOCK = Path(__file__).parent / "kafka-jars.lock"
KAFKA = "org.apache.kafka:kafka_2.13"
DOWNLOADS = 8  # at once: a polite number, and enough to hide the latency of some fifty small files
HTTP_TIMEOUT_S = 60  # jgo's 10 s is short for a slow line; the largest jar has 9 MB

OnProgress = Callable[[int, int], None]


class Jar(msgspec.Struct, frozen=True):
    """One pinned file."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    def __str__(self) -> str:
        return f"{self.group}:{self.artifact}:{self.version}"


def read_lock(path: Path = LOCK, program: str = KAFKA) -> list[Jar]:
    """Every pinned jar, the program's own first.

    Raises:
        LocalKafkaError: a line that can't be read, or another program in the first one.
    """
    pinned = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, digest = line.split()
            group, artifact, version = name.split(":")
        except ValueError:
            raise LocalKafkaError(
                f"{path}, line {number}: expected `group:artifact:version sha256`, found {line!r}. Restore the file."
            ) from None
        pinned.append(Jar(group, artifact, version, digest))
    if not pinned or f"{pinned[0].group}:{pinned[0].artifact}" != program:
        raise LocalKafkaError(f"{path}: expected {program} in its first line, found {len(pinned)} others. Restore the file.")
    return pinned


def kafka_version(path: Path = LOCK) -> str:
    """The pinned version of Apache Kafka."""
    return read_lock(path)[0].version


def cache_root(settings: LocalKafkaSettings) -> Path:
    """The folder where jars are kept, with one folder for each version of Kafka.

    Raises:
        LocalKafkaError: there is no home folder, or Java couldn't name the folder's files.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "headrace" / "kafka" if settings.cache_dir is None else settings.cache_dir.expanduser()
    except RuntimeError as error:
        raise LocalKafkaError(
            f"cache of Kafka's jars: expected a home folder, found none ({error}). Set "
            "HEADRACE_LOCAL_KAFKA__CACHE_DIR to a folder."
        ) from error
    folder = folder.absolute()
    if ":" in str(folder) or not in_utf8(folder):
        raise LocalKafkaError(
            f"cache of Kafka's jars: expected a path in UTF-8 without a colon, which separates Java's paths, found "
            f"{str(folder)!r}. Set HEADRACE_LOCAL_KAFKA__CACHE_DIR to another folder."
        )
    return folder


def jars(
    settings: LocalKafkaSettings,
    *,
    lock: Path = LOCK,
    program: str = KAFKA,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Path]:
    """Download the pinned jars that the cache lacks, and check the hashes of all.

    Two processes may do this at once: a download goes to a folder of its own, is checked there, and is moved into place whole.

    Raises:
        LocalKafkaError: a jar can't be downloaded, or its hash isn't the pinned one.
    """
    pinned = read_lock(lock, program)
    folder = cache_root(settings) / (pinned[0].version if program == KAFKA else f"{pinned[0].artifact}-{pinned[0].version}")
    missing = [jar for jar in pinned if not (folder / jar.filename).is_file()]
    if missing:
        on_progress(len(pinned) - len(missing), len(pinned))
        with _aside(folder) as aside:
            fetch = _fetch_by_maven if settings.resolver == "mvn" else _fetch_by_jgo
            fetch(missing, Path(aside), lambda done: on_progress(len(pinned) - len(missing) + done, len(pinned)))
            for jar in missing:
                _check(jar, Path(aside, jar.filename), "what was downloaded is not what was pinned; nothing was kept.")
            for jar in missing:
                Path(aside, jar.filename).replace(folder / jar.filename)
    for jar in pinned:
        file = folder / jar.filename
        _check(jar, file, f"the cached file was changed. Remove it (`rm {file}`) and start again.")
    return [folder / jar.filename for jar in pinned]


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[str]:
    """A folder for downloads on the same disk; removed at the end. Raises LocalKafkaError where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
    except OSError as error:
        raise LocalKafkaError(
            f"cache of Kafka's jars: expected a folder that can be written, found {error.strerror} at {folder}. Set "
            "HEADRACE_LOCAL_KAFKA__CACHE_DIR to another folder."
        ) from error
    with made:
        yield made.name


def in_utf8(path: Path) -> bool:
    """Whether Java, which reads names of files as UTF-8, sees the same path."""
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return False
    return True


def write_lock(version: str, path: Path = LOCK) -> list[Jar]:
    """Resolve Kafka of this version with all it needs at run time, and pin it.

    log4j's binding for SLF4J is added, as in Apache's own distribution: without it Kafka logs nothing.
    """
    with tempfile.TemporaryDirectory() as aside:
        context = _maven(Path(aside))
        wanted = _resolved(context, KAFKA, version)
        log4j = next(item.version for item in wanted if item.artifactId == "log4j-core")
        wanted += _resolved(context, "org.apache.logging.log4j:log4j-slf4j-impl", log4j)[:1]
        pinned = [Jar(item.groupId, item.artifactId, item.version, _sha256(item.resolve())) for item in wanted]
    pinned[1:] = sorted(pinned[1:], key=str)
    path.write_text(
        f"# Apache Kafka {version} and all it needs at run time: what, then the SHA-256 of its jar.\n"
        f"# Made by `python -m deploy.local_kafka.jars {version}`.\n" + "".join(f"{jar} {jar.sha256}\n" for jar in pinned)
    )
    return pinned


def _resolved(context: Any, name: str, version: str) -> list[Any]:
    from jgo.parse import Coordinate

    group, artifact = name.split(":")
    root = context.create_dependency(Coordinate(group, artifact, version, scope="compile"))
    roots, others = context.resolver.resolve([root])
    return [item.artifact for item in [*roots, *others] if item.scope in ("compile", "runtime")]


def _maven(repository: Path) -> Any:
    """jgo's resolver with a repository of its own: jgo writes files in place, so a shared one can hold half a jar."""
    try:
        from jgo.config import GlobalSettings
        from jgo.constants import MAVEN_CENTRAL_URL
        from jgo.maven import MavenContext
    except ImportError as error:
        raise LocalKafkaError(
            "jgo, which resolves Kafka's jars, is not installed. Install the workers (`make setup`), set "
            "HEADRACE_LOCAL_KAFKA__RESOLVER=mvn to use Maven, or set HEADRACE_KAFKA__BOOTSTRAP_SERVERS to use an existing "
            "cluster."
        ) from error
    # Mirrors in the user's jgo settings are used, as mvn uses those in Maven's settings.
    remote = {"central": MAVEN_CENTRAL_URL} | GlobalSettings.load().repositories
    return MavenContext(repo_cache=repository, remote_repos=remote, timeout=HTTP_TIMEOUT_S)


def _fetch_by_jgo(wanted: Sequence[Jar], folder: Path, on_done: Callable[[int], None]) -> None:
    context = _maven(folder / "repository")

    def fetch(jar: Jar) -> None:
        try:
            found = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
            found.replace(folder / jar.filename)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            raise _unreachable(str(jar), error) from error

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        futures = [pool.submit(fetch, jar) for jar in wanted]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                on_done(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_by_maven(wanted: Sequence[Jar], folder: Path, on_done: Callable[[int], None]) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise LocalKafkaError(
            'local_kafka.resolver = "mvn": expected Maven, found no `mvn` on PATH. Install it, or set '
            "HEADRACE_LOCAL_KAFKA__RESOLVER=jgo, which needs none."
        )
    dependencies = "".join(
        f"<dependency><groupId>{escape(jar.group)}</groupId><artifactId>{escape(jar.artifact)}</artifactId>"
        f"<version>{escape(jar.version)}</version></dependency>"
        for jar in wanted
    )
    pom = folder / "pom.xml"
    pom.write_text(
        "<project><modelVersion>4.0.0</modelVersion><groupId>headrace</groupId><artifactId>local-kafka</artifactId>"
        f"<version>1</version><packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>"
    )
    goal = ["dependency:copy-dependencies", f"-DoutputDirectory={folder.resolve()}", "-DincludeScope=runtime"]
    answer = subprocess.run(
        [maven, "--batch-mode", "--quiet", "--file", str(pom), *goal],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise _unreachable("Kafka's jars", "\n".join((answer.stdout + answer.stderr).splitlines()[:8]))
    on_done(len(wanted))


def _unreachable(what: str, reason: object) -> LocalKafkaError:
    return LocalKafkaError(
        f"{what}: expected to download it, found: {reason}. Check the network and start again; HEADRACE_LOCAL_KAFKA__RESOLVER "
        "chooses how (jgo or mvn), HEADRACE_LOCAL_KAFKA__CACHE_DIR can point at a folder that already holds the jars, and "
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS at an existing cluster, which needs none."
    )


def _check(jar: Jar, file: Path, then: str) -> None:
    try:
        found = _sha256(file)
    except FileNotFoundError:
        raise _unreachable(str(jar), f"no {jar.filename} among what was downloaded") from None
    if found != jar.sha256:
        raise LocalKafkaError(f"{jar}: expected SHA-256 {jar.sha256}, found {found} in {file}: {then}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    write_lock(sys.argv[1])
