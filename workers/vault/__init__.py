"""A vault shard's process, and its clients inside the workers."""
