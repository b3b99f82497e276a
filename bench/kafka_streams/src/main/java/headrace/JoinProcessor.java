package headrace;

import static java.nio.charset.StandardCharsets.UTF_8;

import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.header.internals.RecordHeaders;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.processor.PunctuationType;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;
import org.apache.kafka.streams.state.KeyValueIterator;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * The join of one partition number: every label leaves when the watermark has passed its impression's hold, in impression order.
 *
 * <p>A place is event time (8 bytes), offset (8 bytes), id: RocksDB sorts it by time.
 *
 * <pre>
 * ids      id    -> time, offset, clicked   every impression remembered: dedupe, matching
 * pending  place -> the impression's bytes  those whose window is open; a click after the hold becomes a correction
 * clicked  place -> time of the click       those of them that have one, and whose first label is not out
 * early    place -> the click's bytes       clicks whose impression has not come (time and offset are the click's)
 * meta     name  -> time                    watermarks
 * </pre>
 */
final class JoinProcessor implements Processor<byte[], Event, byte[], byte[]> {
    static final List<String> STORES = List.of("ids", "pending", "clicked", "early", "meta");
    private static final long NEVER_MS = -(1L << 62);
    private static final long EXPIRE_EVERY_MS = 1_000; // of event time: one range scan for all that it settles
    private static final int MAX_OUTPUTS = 20_000; // of one scan: bounds the transaction after a jump of the watermark
    private static final byte[] ZERO = {'0'};
    private static final byte[] ONE = {'1'};
    private static final byte[] FIRST = "first".getBytes(UTF_8);
    private static final byte[] CORRECTION = "correction".getBytes(UTF_8);

    private final Settings settings;
    private ProcessorContext<byte[], byte[]> context;
    private KeyValueStore<byte[], byte[]> ids;
    private KeyValueStore<byte[], byte[]> pending;
    private KeyValueStore<byte[], byte[]> clicked;
    private KeyValueStore<byte[], byte[]> early;
    private KeyValueStore<byte[], byte[]> meta;
    private final Map<ByteBuffer, List<byte[]>> earlyPlaces = new HashMap<>(); // by id; `early` in memory, without its bytes
    private long impressionsSeenMs = NEVER_MS;
    private long clicksSeenMs = NEVER_MS;
    private long watermarkMs = NEVER_MS;
    private long expiredMs = NEVER_MS; // the watermark up to which labels are out
    private long forgottenMs = NEVER_MS; // the watermark at which ids were last forgotten
    private long droppedMs = 0; // pending impressions before this time are deleted: scans don't begin at their tombstones

    JoinProcessor(Settings settings) {
        this.settings = settings;
    }

    @Override
    public void init(ProcessorContext<byte[], byte[]> context) {
        this.context = context;
        ids = context.getStateStore("ids");
        pending = context.getStateStore("pending");
        clicked = context.getStateStore("clicked");
        early = context.getStateStore("early");
        meta = context.getStateStore("meta");
        impressionsSeenMs = stored("impressions");
        clicksSeenMs = stored("clicks");
        watermarkMs = Math.min(impressionsSeenMs, clicksSeenMs);
        expiredMs = stored("expired");
        try (KeyValueIterator<byte[], byte[]> all = early.all()) {
            while (all.hasNext()) {
                byte[] place = all.next().key;
                earlyPlaces.computeIfAbsent(ByteBuffer.wrap(idOf(place)), id -> new ArrayList<>()).add(place);
            }
        }
        // What a jump of the watermark leaves over goes out here.
        context.schedule(Duration.ofMillis(50), PunctuationType.WALL_CLOCK_TIME, now -> expire());
    }

    @Override
    public void process(Record<byte[], Event> record) {
        Event event = record.value();
        RecordMetadata from = context.recordMetadata().orElseThrow();
        boolean click = from.topic().equals(settings.clicks());
        if (event.reason == null && !event.isWatermark() && !Arrays.equals(event.id, record.key())) {
            event.reason = "id_mismatch";
        }
        if (event.reason != null) {
            dead(record.key(), event.value, record.headers(), event.reason, from.topic(), from.offset());
            return;
        }
        if (event.isWatermark()) {
            see(click, event.timeMs);
        } else {
            see(click, event.timeMs - settings.latenessMs());
            if (click) {
                click(record, from.offset());
            } else {
                impression(record, from.offset());
            }
        }
        if (watermarkMs - expiredMs >= EXPIRE_EVERY_MS) {
            expire();
        }
    }

    private void see(boolean click, long timeMs) {
        if (click) {
            clicksSeenMs = Math.max(clicksSeenMs, timeMs);
        } else {
            impressionsSeenMs = Math.max(impressionsSeenMs, timeMs);
        }
        watermarkMs = Math.max(watermarkMs, Math.min(impressionsSeenMs, clicksSeenMs));
    }

    private void impression(Record<byte[], Event> record, long offset) {
        Event event = record.value();
        byte[] known = ids.get(event.id);
        if (event.timeMs < watermarkMs - settings.windowMs() - settings.horizonMs()) {
            dead(record.key(), event.value, record.headers(), "late_impression", settings.impressions(), offset);
            return;
        }
        if (known != null && event.timeMs <= timeOf(known) + settings.horizonMs()) {
            return; // a duplicate
        }
        byte[] place = place(event.timeMs, offset, event.id);
        long clickMs = earlyPlaces.isEmpty() ? -1 : matchEarly(event);
        ids.put(event.id, entry(event.timeMs, offset, clickMs >= 0));
        if (event.timeMs + settings.holdMs() < expiredMs) { // it came after its label was due
            label(place, event.value, clickMs);
        } else if (clickMs >= 0) {
            clicked.put(place, time(clickMs));
        }
        if (event.timeMs >= droppedMs) {
            pending.put(place, event.value);
        }
    }

    /** The time of the earliest click that waits for this impression, -1 without one. */
    private long matchEarly(Event event) {
        List<byte[]> waiting = earlyPlaces.get(ByteBuffer.wrap(event.id));
        if (waiting == null) {
            return -1;
        }
        long first = Long.MAX_VALUE;
        for (byte[] click : List.copyOf(waiting)) {
            long afterMs = timeOf(click) - event.timeMs;
            if (afterMs >= 0 && afterMs <= settings.windowMs()) {
                first = Math.min(first, timeOf(click));
                forgetEarly(click);
            }
        }
        return first == Long.MAX_VALUE ? -1 : first;
    }

    private void click(Record<byte[], Event> record, long offset) {
        Event event = record.value();
        byte[] known = ids.get(event.id);
        long afterMs = known == null ? -1 : event.timeMs - timeOf(known);
        if (afterMs < 0 || afterMs > settings.windowMs()) {
            if (event.timeMs < watermarkMs) {
                dead(record.key(), event.value, record.headers(), "orphan_click", settings.clicks(), offset);
            } else {
                byte[] place = place(event.timeMs, offset, event.id);
                early.put(place, event.value);
                earlyPlaces.computeIfAbsent(ByteBuffer.wrap(event.id), id -> new ArrayList<>()).add(place);
            }
            return;
        }
        if (known[16] != 0 || timeOf(known) + settings.windowMs() < watermarkMs) {
            return; // a duplicate, or too late
        }
        ids.put(event.id, entry(timeOf(known), offsetOf(known), true));
        byte[] place = place(timeOf(known), offsetOf(known), event.id);
        if (timeOf(known) + settings.holdMs() >= expiredMs) {
            clicked.put(place, time(event.timeMs));
        } else {
            context.forward(example(place, pending.get(place), event.timeMs, CORRECTION), "examples");
        }
    }

    /** Sends the first label of all that the watermark has passed the hold of, and forgets what its time has run out for. */
    private void expire() {
        if (watermarkMs <= expiredMs) {
            return;
        }
        long until = watermarkMs - settings.holdMs();
        int sent = 0;
        long from = Math.max(expiredMs - settings.holdMs(), 0);
        try (KeyValueIterator<byte[], byte[]> due = pending.range(place(from), place(until));
                KeyValueIterator<byte[], byte[]> clicks = clicked.range(place(from), place(until))) {
            while (due.hasNext()) {
                // Cut between two event times, so that what is left over begins where this ends.
                if (sent >= MAX_OUTPUTS && timeOf(due.peekNextKey()) > from) {
                    until = timeOf(due.peekNextKey());
                    break;
                }
                KeyValue<byte[], byte[]> row = due.next();
                from = timeOf(row.key);
                sent++;
                long clickMs = -1;
                if (clicks.hasNext() && Arrays.equals(clicks.peekNextKey(), row.key)) {
                    clickMs = timeOf(clicks.next().value);
                    clicked.delete(row.key);
                }
                label(row.key, row.value, clickMs);
                if (settings.holdMs() == settings.windowMs()) {
                    pending.delete(row.key);
                }
            }
        }
        expiredMs = until + settings.holdMs();
        drop(watermarkMs - settings.windowMs());
        forget();
        meta.put(name("impressions"), time(impressionsSeenMs));
        meta.put(name("clicks"), time(clicksSeenMs));
        meta.put(name("expired"), time(expiredMs));
    }

    /** The first label of an impression, and a correction where its click has been read and is later than the hold. */
    private void label(byte[] place, byte[] value, long clickMs) {
        boolean held = clickMs - timeOf(place) <= settings.holdMs();
        context.forward(example(place, value, held ? clickMs : -1, FIRST), "examples");
        if (!held) {
            context.forward(example(place, value, clickMs, CORRECTION), "examples");
        }
    }

    /** Deletes what is pending from before a time: its window is over. */
    private void drop(long beforeMs) {
        if (settings.holdMs() < settings.windowMs() && beforeMs > droppedMs) {
            try (KeyValueIterator<byte[], byte[]> due = pending.range(place(droppedMs), place(beforeMs))) {
                while (due.hasNext()) {
                    pending.delete(due.next().key);
                }
            }
        }
        droppedMs = Math.max(droppedMs, Math.min(beforeMs, expiredMs - settings.holdMs()));
    }

    private void forget() {
        if (!earlyPlaces.isEmpty()) {
            try (KeyValueIterator<byte[], byte[]> due = early.range(place(0), place(watermarkMs))) {
                while (due.hasNext()) {
                    KeyValue<byte[], byte[]> click = due.next();
                    dead(idOf(click.key), click.value, null, "orphan_click", settings.clicks(), offsetOf(click.key));
                    forgetEarly(click.key);
                }
            }
        }
        long rememberedMs = watermarkMs - settings.windowMs() - 2 * settings.horizonMs();
        if (forgottenMs == NEVER_MS) {
            forgottenMs = watermarkMs;
        } else if (watermarkMs - forgottenMs >= settings.horizonMs()) {
            forgottenMs = watermarkMs; // ids are not in order of time: one scan of all, once a horizon
            try (KeyValueIterator<byte[], byte[]> all = ids.all()) {
                while (all.hasNext()) {
                    KeyValue<byte[], byte[]> row = all.next();
                    if (timeOf(row.value) < rememberedMs) {
                        ids.delete(row.key);
                    }
                }
            }
        }
    }

    private void forgetEarly(byte[] place) {
        early.delete(place);
        ByteBuffer id = ByteBuffer.wrap(idOf(place));
        List<byte[]> places = earlyPlaces.get(id);
        places.removeIf(other -> Arrays.equals(other, place));
        if (places.isEmpty()) {
            earlyPlaces.remove(id);
        }
    }

    private static Record<byte[], byte[]> example(byte[] place, byte[] value, long clickMs, byte[] kind) {
        Headers headers = new RecordHeaders();
        headers.add("label", clickMs < 0 ? ZERO : ONE);
        headers.add("weight", ONE);
        headers.add("kind", kind);
        headers.add("impression_ms", name(Long.toString(timeOf(place))));
        headers.add("source_offset", name(Long.toString(offsetOf(place))));
        if (clickMs >= 0) {
            headers.add("click_ms", name(Long.toString(clickMs)));
        }
        return new Record<>(idOf(place), value, timeOf(place), headers);
    }

    private void dead(byte[] key, byte[] value, Headers original, String reason, String topic, long offset) {
        Headers headers = new RecordHeaders();
        headers.add("reason", name(reason));
        headers.add("source_topic", name(topic));
        headers.add("source_partition", name(Integer.toString(context.taskId().partition())));
        headers.add("source_offset", name(Long.toString(offset)));
        if (original != null) {
            original.forEach(headers::add);
        }
        context.forward(new Record<>(key, value, Math.max(watermarkMs, 0), headers), "dead-letters");
    }

    private long stored(String name) {
        byte[] found = meta.get(name(name));
        return found == null ? NEVER_MS : timeOf(found);
    }

    private static byte[] name(String text) {
        return text.getBytes(UTF_8);
    }

    private static byte[] time(long timeMs) {
        return ByteBuffer.allocate(8).putLong(timeMs).array();
    }

    private static byte[] place(long timeMs) {
        return time(Math.max(timeMs, 0));
    }

    private static byte[] place(long timeMs, long offset, byte[] id) {
        return ByteBuffer.allocate(16 + id.length).putLong(timeMs).putLong(offset).put(id).array();
    }

    private static byte[] entry(long timeMs, long offset, boolean clicked) {
        return ByteBuffer.allocate(17).putLong(timeMs).putLong(offset).put((byte) (clicked ? 1 : 0)).array();
    }

    private static long timeOf(byte[] packed) {
        return ByteBuffer.wrap(packed).getLong();
    }

    private static long offsetOf(byte[] packed) {
        return ByteBuffer.wrap(packed).getLong(8);
    }

    private static byte[] idOf(byte[] place) {
        return Arrays.copyOfRange(place, 16, place.length);
    }
}
