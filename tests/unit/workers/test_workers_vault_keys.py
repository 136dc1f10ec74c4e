"""Whose keys open a vault."""

import zmq

from workers import curve
from workers.vault import keys

SECRET = bytes(range(32))


def test_a_vault_and_its_clients_have_matching_keys() -> None:
    """Each holds the public half of the other's pair."""
    shard, client = keys.shard_keys(SECRET), keys.client_keys(SECRET)
    assert shard.client == client.public
    assert client.server == zmq.curve_public(shard.secret)


def test_a_vaults_keys_are_nobody_elses() -> None:
    """Neither an ingress of the cluster nor a client of another one is let in."""
    ours = keys.client_keys(SECRET)
    assert ours.public != curve.client_keys(SECRET).public
    assert ours.server != curve.client_keys(SECRET).server
    assert ours.public != keys.client_keys(bytes(32)).public


def test_the_vaults_secret_does_not_tell_the_clusters() -> None:
    """What derives from it is of no use on the direct channel."""
    theirs = keys.vault_secret(SECRET)
    assert theirs != SECRET
    assert len(theirs) == 32
    assert curve.client_keys(theirs).public != curve.client_keys(SECRET).public
