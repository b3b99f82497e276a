"""Clients and processes: forks before and after a client was made, and programs that end without closing theirs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from deploy.settings import Settings
from stream.topics.admin import create_topics
from tests.headrace.test_client import records

pytestmark = pytest.mark.kafka


def run(code: str, settings: Settings, within_s: float = 60) -> subprocess.CompletedProcess[str]:
    """A program of its own, with the address and the topic prefix as arguments."""
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            textwrap.dedent(code),
            settings.kafka.bootstrap_servers,
            settings.topics.prefix,
        ],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


def test_a_client_made_before_a_fork_says_so_at_once(topics: Settings) -> None:
    began = time.monotonic()
    done = run(
        """
        import os, sys, time
        from headrace import Client, UnusableClient
        from tests.headrace.test_arguments import USES

        client = Client(sys.argv[1], topic_prefix=sys.argv[2])
        client.send_impression("before", features={})
        later = client.ask_later({}, [("a", {})])   # all of its threads run
        stream = client.subscribe_scores()
        child = os.fork()
        if child == 0:
            more = {"close": lambda c: c.close(), "poll": lambda c: stream.poll(), "end": lambda c: stream.close()}
            for name, use in {**USES, **more}.items():
                try:
                    use(client)
                    print("child used", name)
                except UnusableClient as error:
                    assert "which was forked later and has none of its threads" in str(error), error
                    assert "after the fork, one in each process." in str(error), error
            with Client(sys.argv[1], topic_prefix=sys.argv[2]) as own:
                own.send_impression("child", features={})
            print("child sent its own")
            sys.exit(3)                             # an ordinary end: nothing that was inherited may hang it
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        client.send_impression("after", features={})
        stream.poll(0)
        stream.close()
        client.close()
        print("parent fine")
        """,
        topics,
    )
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (["child sent its own", "parent fine"], "", 0)
    assert time.monotonic() - began < 30
    assert {record.key for record in records(topics, "impressions")} == {b"before", b"child", b"after"}


def test_a_block_that_a_child_leaves_does_not_hang_it(topics: Settings) -> None:
    done = run(
        """
        import os, sys
        from headrace import Client

        with Client(sys.argv[1], topic_prefix=sys.argv[2]) as client:
            client.send_impression("i", features={})
            child = os.fork()
            if child == 0:
                sys.exit(3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        """,
        topics,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(topics: Settings, method: str) -> None:
    done = run(
        f"""
        import multiprocessing, sys
        from tests.headrace.made_in_child import work, use
        from headrace import Client, UnusableClient

        context = multiprocessing.get_context("{method}")
        with Client(sys.argv[1], topic_prefix=sys.argv[2]) as client:
            with context.Pool(2) as pool:
                pool.starmap(work, [(*sys.argv[1:3], f"i{{n}}") for n in range(4)])
            try:
                process = context.Process(target=use, args=(client,))
                process.start()
                process.join()
                print("exit code", process.exitcode)
            except UnusableClient as error:
                print(error)
        """,
        topics,
    )
    assert done.returncode == 0, done.stderr
    if method == "fork":
        assert done.stdout == "exit code 1\n" and "headrace.errors.UnusableClient: client: expected the process" in done.stderr
    else:
        assert done.stdout.startswith("client: expected it to stay in the process that made it, found it being pickled")
    assert {record.key for record in records(topics, "impressions")} == {f"i{n}".encode() for n in range(4)}


def test_a_program_that_ends_without_closing_has_sent_everything(topics: Settings) -> None:
    done = run(
        """
        import sys
        from headrace import Client

        client = Client(sys.argv[1], topic_prefix=sys.argv[2], linger_ms=3_000)  # longer than kafka-python waits at the end
        for number in range(2_000):
            client.send_impression(f"i{number}", features={"x": "y" * 500})
        client.request_scores({}, [("a", {})])
        raise KeyError("ended by an error")
        """,
        topics,
    )
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'ended by an error'\n"), done.stderr
    assert len(records(topics, "impressions")) == 2_000
    assert len(records(topics, "score-requests")) == 1


def test_a_program_that_ends_without_closing_names_what_was_lost(settings: Settings) -> None:
    create_topics(settings.kafka, settings.topics.model_copy(update={"max_message_bytes": 2_000}))
    done = run(
        """
        import sys
        from headrace import Client

        client = Client(sys.argv[1], topic_prefix=sys.argv[2])
        client.send_impression("lost", features={"f": "x" * 5_000})
        """,
        settings,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("client: ")]
    assert told.startswith(
        "client: expected close() before the program ended, found it open and events that may be lost. flush: "
    )
    assert "found 1 that were not: " in told and "impressions, key 'lost': MessageSizeTooLargeError" in told
