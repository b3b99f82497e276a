import java.util.Properties;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringSerializer;

/** Sends impressions and every third one's click with Java's own client and nothing set but addresses and serializers. */
class SendByDefault {
    public static void main(String[] args) throws Exception {
        String impressions = args[1] + "impressions", clicks = args[1] + "clicks", name = args[2];
        int count = Integer.parseInt(args[3]);
        long time = Long.parseLong(args[4]);
        var settings = new Properties();
        settings.put("bootstrap.servers", args[0]);
        settings.put("key.serializer", StringSerializer.class.getName());
        settings.put("value.serializer", StringSerializer.class.getName());
        try (var producer = new KafkaProducer<String, String>(settings)) {
            for (int index = 0; index < count; index++) {
                String id = name + "-" + index;
                String shown = """
                    {"impression_id": "%s", "timestamp": %d, "features": {"user": "é"}}""".formatted(id, time + index);
                producer.send(new ProducerRecord<>(impressions, id, shown));
                if (index % 3 == 0) {
                    String clicked = """
                        {"impression_id": "%s", "timestamp": %d}""".formatted(id, time + index);
                    producer.send(new ProducerRecord<>(clicks, id, clicked));
                }
            }
        }
    }
}
