"""Text of any source -> the shards of a token store."""
