"""Blocks, who holds them, what moving or computing them costs, and the plans made of that."""
