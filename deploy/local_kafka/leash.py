"""The process that stops a local Kafka when the process that uses it has ended, in whatever way.

It reads its standard input, a pipe that only the user's process holds open: the end of the input is the end of the user.
Nothing is imported before that, so that waiting costs little memory.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    # A terminal's hang-up or a supervisor's signal to all is exactly when it must still do its work.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()

    from pathlib import Path

    from deploy.local_kafka.cluster import LocalKafka
    from deploy.settings import LocalKafkaSettings

    LocalKafka(LocalKafkaSettings(dir=Path(sys.argv[1]))).stop()


if __name__ == "__main__":
    main()
