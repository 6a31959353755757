"""The token store: shards of token ids on disk, ours or MDS."""
