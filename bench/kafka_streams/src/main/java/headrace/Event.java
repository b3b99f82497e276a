package headrace;

import static java.nio.charset.StandardCharsets.US_ASCII;
import static java.nio.charset.StandardCharsets.UTF_8;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.Headers;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.streams.processor.TimestampExtractor;

/** The envelope of an impression or a click, or a watermark record: read once, as the record is taken off the log. */
final class Event {
    static final String WATERMARK_HEADER = "headrace-watermark";
    private static final long MAX_TIMESTAMP_MS = 253_402_300_799_999L; // the end of the year 9999
    private static final JsonFactory JSON = new JsonFactory();

    final byte[] value;
    byte[] id; // null for a watermark record
    long timeMs = -1;
    String reason; // why it is a dead letter, else null

    private Event(byte[] value) {
        this.value = value;
    }

    boolean isWatermark() {
        return id == null && reason == null;
    }

    /** Reads the envelope; every record becomes an event, the unreadable ones with a reason. */
    static final class Reader implements Deserializer<Event> {
        @Override
        public Event deserialize(String topic, byte[] data) {
            throw new UnsupportedOperationException("watermark records are in the headers");
        }

        @Override
        public Event deserialize(String topic, Headers headers, byte[] data) {
            Event event = new Event(data);
            if (data == null || data.length == 0) {
                Header mark = headers.lastHeader(WATERMARK_HEADER);
                try {
                    event.timeMs = mark == null ? -1 : Long.parseLong(new String(mark.value(), US_ASCII));
                } catch (NumberFormatException error) {
                    event.reason = "out_of_range";
                }
                event.reason = mark == null ? "empty_value" : event.reason;
                return event;
            }
            try (JsonParser parser = JSON.createParser(data)) {
                event.reason = event.read(parser);
            } catch (IOException error) {
                event.reason = "malformed_json";
            }
            return event;
        }
    }

    private String read(JsonParser parser) throws IOException {
        if (parser.nextToken() != JsonToken.START_OBJECT) {
            return "wrong_type";
        }
        String wrong = null;
        boolean timed = false;
        while (parser.nextToken() != JsonToken.END_OBJECT) {
            String name = parser.currentName();
            JsonToken token = parser.nextToken();
            if (name.equals("impression_id")) {
                wrong = token == JsonToken.VALUE_STRING ? wrong : "wrong_type";
                id = parser.getText().getBytes(UTF_8);
            } else if (name.equals("timestamp")) {
                if (token == JsonToken.VALUE_NUMBER_INT) {
                    timed = true;
                    timeMs = parser.getNumberType() == JsonParser.NumberType.BIG_INTEGER ? -1 : parser.getLongValue();
                } else {
                    wrong = "wrong_type";
                }
            } else {
                parser.skipChildren();
            }
        }
        if (parser.nextToken() != null) {
            return "malformed_json";
        }
        if (wrong != null) {
            return wrong;
        }
        if (id == null || !timed) {
            return "missing_field";
        }
        return id.length == 0 || timeMs < 0 || timeMs > MAX_TIMESTAMP_MS ? "out_of_range" : null;
    }

    /** Event time, so that Kafka Streams takes from both topics in its order; judges how far it is ahead of the arrival. */
    static final class Clock implements TimestampExtractor {
        private final long maxFutureMs;

        Clock(long maxFutureMs) {
            this.maxFutureMs = maxFutureMs;
        }

        @Override
        public long extract(ConsumerRecord<Object, Object> record, long partitionTimeMs) {
            Event event = (Event) record.value();
            if (event.reason == null && !event.isWatermark() && event.timeMs - record.timestamp() > maxFutureMs) {
                event.reason = "future_timestamp";
            }
            boolean usable = event.reason == null && !event.isWatermark();
            return usable ? event.timeMs : Math.max(partitionTimeMs, 0);
        }
    }
}
