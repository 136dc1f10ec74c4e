"""What a vault shard decides: what it stores, for whom, for how long, and what goes for it."""
