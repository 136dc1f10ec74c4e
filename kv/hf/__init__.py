"""KV geometry out of Hugging Face configs."""
