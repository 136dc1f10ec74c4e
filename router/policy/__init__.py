"""Decisions of the router, one a file: frozen input, pure function, result with its reason."""
