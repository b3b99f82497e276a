package headrace;

import java.util.Map;
import org.apache.kafka.streams.state.RocksDBConfigSetter;
import org.rocksdb.BlockBasedTableConfig;
import org.rocksdb.BloomFilter;
import org.rocksdb.Cache;
import org.rocksdb.CompressionType;
import org.rocksdb.LRUCache;
import org.rocksdb.Options;
import org.rocksdb.WriteBufferManager;

/** One block cache and one bound on write buffers for all stores, as Kafka's page on memory management has it. */
public final class Rocks implements RocksDBConfigSetter {
    private static final long TOTAL_BYTES = 320L << 20;
    private static final long WRITE_BUFFER_BYTES = 256L << 20; // four partitions with 64 MB each, as the join has
    private static final Cache CACHE = new LRUCache(TOTAL_BYTES);
    private static final WriteBufferManager BUFFERS = new WriteBufferManager(WRITE_BUFFER_BYTES, CACHE);
    private static final BloomFilter BLOOM = new BloomFilter(10, false); // most ids that are looked up are new

    @Override
    public void setConfig(String store, Options options, Map<String, Object> configs) {
        BlockBasedTableConfig table = (BlockBasedTableConfig) options.tableFormatConfig();
        table.setBlockCache(CACHE);
        table.setCacheIndexAndFilterBlocks(true);
        table.setFilterPolicy(BLOOM);
        table.setBlockSize(16 << 10);
        options.setWriteBufferManager(BUFFERS);
        options.setWriteBufferSize(store.equals("pending") ? 64 << 20 : 16 << 20);
        options.setMaxWriteBufferNumber(2);
        options.setCompressionType(CompressionType.LZ4_COMPRESSION);
        options.setTableFormatConfig(table);
    }

    @Override
    public void close(String store, Options options) {}
}
