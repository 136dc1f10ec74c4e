"""The pools: replicas that each own one vLLM engine and answer over a direct channel."""
