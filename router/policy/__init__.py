"""Decisions of the router, one a file: frozen input, pure function, result with its reason."""

from enum import StrEnum


class Policy(StrEnum):
    """The routing policies, by the names of configuration, orders and metrics: a closed list.

    `router.policy.registry` has the function of each. This module loads nothing else, so that the
    configuration and the command line may name policies.
    """

    BREAKEVEN = "breakeven"  # the cheapest pair by predicted time
    LEAST_LOADED = "least_loaded"  # the kill switch: neither costs nor caches are looked at
    PREFIX_AFFINITY = "prefix_affinity"  # the longest cached prefix, whatever the load
    ROUND_ROBIN = "round_robin"  # one after the other
    THRESHOLD = "threshold"  # what tiers hold is fetched past a fixed number of tokens
    ALWAYS_FETCH = "always_fetch"  # what tiers hold is fetched
    ALWAYS_COMPUTE = "always_compute"  # nothing is taken from tiers
