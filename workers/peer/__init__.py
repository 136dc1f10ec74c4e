"""Blocks of another replica's host tier: who lends them, and who fetches them."""
