"""Going on from a version in another cluster, where the topic `examples` is another one.

The version's offsets mean nothing there, so somebody who knows what the new topic holds has to say where learning begins
(`trainer.examples_from`). The choice counts only while the newest version is one of the former topic. So it can stay in the
settings, and no restart applies it twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from stream.errors import PositionError
from stream.trainer.start import Start

__all__ = ["moved"]

log = logging.getLogger(__name__)


def moved(
    start: Start, examples_from: str, topic_ids: Mapping[str, str], beginnings: Mapping[int, int], ends: Mapping[int, int]
) -> Start:
    """The same version with the offsets that were chosen, if `examples` is another topic than it was trained on.

    Args:
        examples_from: the setting.
        topic_ids: Kafka's ids of the topics as they are now, by their names without the prefix.
        beginnings, ends: first and next offset of every partition's log.

    Raises:
        PositionError: the setting leaves out a partition, or names one that the topic doesn't have.
    """
    manifest = start.manifest
    if examples_from == "version" or manifest is None:
        return start
    trained, now = manifest.topic_ids.get("examples"), topic_ids.get("examples")
    if trained is None or now is None or trained == now:
        return start
    if examples_from in ("start", "end"):
        chosen = dict(beginnings if examples_from == "start" else ends)
    else:
        chosen = {int(partition): int(offset) for partition, offset in (each.split(":") for each in examples_from.split(","))}
    if chosen.keys() != beginnings.keys():
        raise PositionError(
            f"trainer.examples_from: expected an offset for each of the partitions {sorted(beginnings)} of examples, found "
            f"{examples_from!r}. Name each partition once: 0:120,1:95."
        )
    log.warning(
        "version %d was trained on examples with id %s, this topic has id %s: going on at %s, as trainer.examples_from says",
        *(manifest.version, trained, now, chosen),
    )
    offsets = {str(partition): offset for partition, offset in sorted(chosen.items())}
    return replace(start, manifest=structs.replace(manifest, offsets=offsets), moved=True)
