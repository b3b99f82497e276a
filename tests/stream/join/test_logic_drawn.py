"""The decisions against the oracle, on logs that hypothesis draws, however they are cut into steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.join.checked import SETTINGS, Checked, join_settings

CHANGED = st.builds(
    join_settings,
    window_ms=st.sampled_from([4, 10, 25]),
    dedupe_horizon_ms=st.sampled_from([0, 3, 8, 30]),
    negative_skew_ms=st.sampled_from([0, 2, 12]),
    max_outputs=st.sampled_from([1, 2, 10_000]),
    hold_ms=st.sampled_from([0, 3, 10, 25]),
    negative_rate=st.sampled_from([1.0, 0.4]),
)


KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
ROWS = st.lists(st.tuples(KEYS, st.integers(0, 60)), max_size=6)
RUNS = st.tuples(st.sampled_from(["impressions", "clicks"]), ROWS, st.sampled_from([-1, -1, -1, 5, 25, 45, 70]))
STEPS = st.lists(st.tuples(st.lists(RUNS, max_size=4), st.booleans(), st.booleans()), max_size=12)


@settings(max_examples=200, deadline=None)
@given(SETTINGS, STEPS)
def test_any_log_cut_anyhow(chosen, steps):
    checked = Checked(chosen)
    for runs, impressions_idle, clicks_idle in steps:
        checked.step(runs, impressions_idle, clicks_idle)
    checked.end()


@settings(max_examples=200, deadline=None)
@given(SETTINGS, st.lists(st.tuples(st.one_of(st.none(), CHANGED), STEPS), max_size=4))
def test_settings_change_in_the_middle(chosen, lives):
    """What was read before goes on under its own settings; nobody is labelled twice, and nobody never."""
    checked = Checked(chosen)
    for changed, steps in lives:
        if changed is not None:
            checked.real.change(changed)
        for runs, impressions_idle, clicks_idle in steps:
            checked.step(runs, impressions_idle, clicks_idle)
    checked.end()


@st.composite
def logs_in_order(draw):
    """Sources out of order within the lateness, repeated impressions and clicks, each id once: one right answer each."""
    chosen = draw(SETTINGS)
    lateness, window, skew = chosen.lateness_ms, chosen.window_ms, chosen.negative_skew_ms
    log: dict[str, list[tuple[bytes, int]]] = {"impressions": [], "clicks": []}
    times = draw(st.lists(st.integers(skew, 60), max_size=15))
    expected = {}
    for index, time_ms in enumerate(times):
        key = b"%d" % index
        log["impressions"] += [(key, time_ms)] * draw(st.integers(1, 2))
        delays = draw(st.lists(st.integers(-skew - 4, window + 4), max_size=3))
        log["clicks"] += [(key, max(time_ms + delay, 0)) for delay in delays]
        clicks = [time for who, time in log["clicks"] if who == key]
        expected[key, time_ms] = any(-skew <= click - time_ms <= window for click in clicks)
    for source, rows in log.items():
        arrivals = [time + draw(st.integers(0, lateness)) for _, time in rows]
        log[source] = [row for _, row in sorted(zip(arrivals, rows, strict=True), key=lambda pair: pair[0])]
    return chosen, log, expected


@settings(max_examples=100, deadline=None)
@given(logs_in_order(), st.data())
def test_in_order_every_cut_gives_the_labels_of_the_window_rule(given_log, data):
    chosen, log, expected = given_log
    checked, left = Checked(chosen), {source: list(rows) for source, rows in log.items()}
    while any(left.values()):
        runs = []
        for source in data.draw(st.permutations(["impressions", "clicks", "impressions", "clicks"])):
            count = data.draw(st.integers(0, 5))
            runs.append((source, left[source][:count], -1))
            del left[source][:count]
        checked.step(runs, False, False)
    checked.end()
    said = {**dict.fromkeys(checked.left_out, -1), **checked.firsts, **checked.corrections}
    found = {checked.oracle.accepted[offset]: click >= 0 for offset, click in said.items()}
    assert found == expected
    assert checked.counts["late_impressions"] == checked.counts["late_clicks"] == 0
