package headrace;

import java.util.Map;

/** What bench/peer_kafka_streams.py asks for, by environment variables. */
record Settings(
        String bootstrapServers,
        String application,
        String impressions,
        String clicks,
        String examples,
        String deadLetters,
        String stateDir,
        String started,
        long windowMs,
        long holdMs,
        long latenessMs,
        long horizonMs,
        long maxFutureMs) {

    static Settings of(Map<String, String> env) {
        return new Settings(
                env.get("PEER_BROKER"),
                env.get("PEER_APPLICATION"),
                env.get("PEER_IMPRESSIONS"),
                env.get("PEER_CLICKS"),
                env.get("PEER_EXAMPLES"),
                env.get("PEER_DEAD_LETTERS"),
                env.get("PEER_STATE_DIR"),
                env.get("PEER_STARTED"),
                Long.parseLong(env.get("PEER_WINDOW_MS")),
                Long.parseLong(env.get("PEER_HOLD_MS")),
                Long.parseLong(env.get("PEER_LATENESS_MS")),
                Long.parseLong(env.get("PEER_HORIZON_MS")),
                Long.parseLong(env.get("PEER_MAX_FUTURE_MS")));
    }
}
