"""What the processes of `test_processes.py` do: a module, since a spawned process must find its functions by name."""

from __future__ import annotations

from headrace import Client


def work(servers: str, prefix: str, name: str) -> None:
    """As an application should: a client of this process's own."""
    with Client(servers, topic_prefix=prefix) as client:
        client.send_impression(name, features={})


def use(client: Client) -> None:
    """As it should not: a client that came from the parent."""
    client.send_impression("i", features={})
