"""The process that stops a local Kafka when the process that uses it has ended, in whatever way.

Its standard input is a pipe that only the user's process holds open, so the input ends when that process ends. All that
stopping needs is imported only then, so that waiting takes little memory.
"""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Wait for the end of standard input, then stop the brokers of the folder in the first argument."""
    # A terminal's hang-up, or a supervisor's signal to a whole group, ends the user's process: this one must outlive it.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()

    from pathlib import Path

    from deploy.local_kafka.cluster import LocalKafka
    from deploy.settings import LocalKafkaSettings

    LocalKafka(LocalKafkaSettings(dir=Path(sys.argv[1]))).stop()


if __name__ == "__main__":
    main()
