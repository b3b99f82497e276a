"""Sending streams of events to Kafka: a data set replayed, a simulation, and watermarks for sparse streams.

| module | what it does |
| --- | --- |
| `feed` | sends whole batches to one partition at a time, and paces them |
| `sender`, `stats` | what a replay and a simulation share: pacing, counts, an early stop, the last watermark |
| `replay`, `scoring` | a data set in event-time order, with score requests for a part of it |
| `simulation`, `arrivals`, `simulate` | a stream with known click probabilities; its disorder; sending it |
| `ended_streams` | rejects a replay that the join would drop as late |
| `watermarks` | sends watermarks on a timer |
| `partitions` | murmur2 of many keys at once |
"""
