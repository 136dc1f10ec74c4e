"""The catalogue process: who holds which block, and what every ingress has sent where."""
