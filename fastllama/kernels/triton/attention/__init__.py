"""Flash attention over contiguous and paged keys, split-KV decoding, merging of states."""
