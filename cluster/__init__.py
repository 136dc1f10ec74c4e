"""Configuration, wiring, scaling and the command line."""
