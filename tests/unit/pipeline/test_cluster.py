"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import pytest

from vitray.errors import ClusterError
from vitray.pipeline.cluster import share_out


def test_shares_leave_a_cpu_beside_the_actors_and_refuse_what_cannot_move() -> None:
    small = share_out([{"CPU": 2}], "auto")
    assert (small.actors, small.actor_cpus, small.decoder_cpus, small.threads) == (1, 1, 0.5, 2)
    gpus = share_out([{"CPU": 16, "GPU": 2}, {"CPU": 8}], "auto")
    assert (gpus.actors, gpus.actor_cpus, gpus.actor_gpus, gpus.decoder_cpus) == (2, 1, 1, 1)
    assert share_out([{"CPU": 16, "GPU": 2}], "cpu").actor_gpus == 0
    for nodes, text in (
        ([{"CPU": 1}], "needs 2"),
        ([{"CPU": 2, "GPU": 2}], "one per GPU"),
        ([{"CPU": 1}, {"CPU": 1}], "no machine"),
    ):
        with pytest.raises(ClusterError, match=text):
            share_out(nodes, "auto")
