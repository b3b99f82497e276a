package headrace;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.AutoOffsetReset;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.state.Stores;

/** The peer of bench/join.py: the same join on the Processor API of Kafka Streams, exactly once, tuned for throughput. */
public final class Join {
    public static void main(String[] args) throws Exception {
        Settings settings = Settings.of(System.getenv());
        KafkaStreams streams = new KafkaStreams(topology(settings), config(settings));
        CountDownLatch stopped = new CountDownLatch(1);
        streams.setUncaughtExceptionHandler(error -> {
            error.printStackTrace();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.RUNNING) {
                note(settings.started());
            } else if (now == KafkaStreams.State.ERROR || now == KafkaStreams.State.NOT_RUNNING) {
                stopped.countDown();
            }
        });
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
        stopped.await();
    }

    /** Tells when the partitions are assigned and fetching begins, as the start of the file's name says. */
    private static void note(String started) {
        try {
            Files.createFile(Path.of(started));
        } catch (java.nio.file.FileAlreadyExistsException again) {
            // A rebalance; the first time counts.
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }

    private static Topology topology(Settings settings) {
        Event.Clock clock = new Event.Clock(settings.maxFutureMs());
        Topology topology = new Topology()
                .addSource(AutoOffsetReset.earliest(), "impressions", clock, new ByteArrayDeserializer(), new Event.Reader(), settings.impressions())
                .addSource(AutoOffsetReset.earliest(), "clicks", clock, new ByteArrayDeserializer(), new Event.Reader(), settings.clicks())
                .addProcessor("join", () -> new JoinProcessor(settings), "impressions", "clicks");
        for (String name : JoinProcessor.STORES) {
            var store = Stores.keyValueStoreBuilder(
                    Stores.persistentKeyValueStore(name), Serdes.ByteArray(), Serdes.ByteArray());
            // Rows are written once and deleted once: a cache before the store would only be passed through.
            topology.addStateStore(name.equals("meta") ? store.withCachingEnabled() : store.withCachingDisabled(), "join");
        }
        ByteArraySerializer bytes = new ByteArraySerializer();
        return topology
                .addSink("examples", settings.examples(), bytes, bytes, "join")
                .addSink("dead-letters", settings.deadLetters(), bytes, bytes, "join");
    }

    private static Properties config(Settings settings) {
        Properties config = new Properties();
        config.putAll(Map.of(
                StreamsConfig.APPLICATION_ID_CONFIG, settings.application(),
                StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, settings.bootstrapServers(),
                StreamsConfig.STATE_DIR_CONFIG, settings.stateDir(),
                StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2,
                StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1,
                StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, 100, // as the join's step_ms
                StreamsConfig.ROCKSDB_CONFIG_SETTER_CLASS_CONFIG, Rocks.class));
        config.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, 32L << 20);
        config.put(StreamsConfig.consumerPrefix(ConsumerConfig.MAX_POLL_RECORDS_CONFIG), 10_000);
        config.put(StreamsConfig.consumerPrefix(ConsumerConfig.MAX_PARTITION_FETCH_BYTES_CONFIG), 4 << 20);
        config.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), 900_000);
        config.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), 100);
        config.put(StreamsConfig.producerPrefix(ProducerConfig.BUFFER_MEMORY_CONFIG), 64 << 20);
        config.put(StreamsConfig.producerPrefix(ProducerConfig.MAX_REQUEST_SIZE_CONFIG), 4 << 20);
        // For trials: `name=value` of Kafka Streams' configuration, separated by commas.
        for (String pair : System.getenv().getOrDefault("PEER_CONFIG", "").split(",")) {
            if (pair.contains("=")) {
                config.put(pair.substring(0, pair.indexOf('=')), pair.substring(pair.indexOf('=') + 1));
            }
        }
        return config;
    }
}
