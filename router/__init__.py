"""The ingress: vLLM's HTTP API over a pool of engines, and the plan of every request."""
