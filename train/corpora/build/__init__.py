"""From the files of a corpus to text and token shards."""
