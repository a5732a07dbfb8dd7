"""What a worker gets of its machine: decoder processes with a GPU, and enough shards for them."""

from __future__ import annotations

import pytest

from vitray.pipeline.machines import local_share, share_out


@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_a_worker_with_a_gpu_has_decoder_processes_and_shards_for_all_of_them(cpus: int) -> None:
    share = local_share(cpus, has_gpu=True)
    assert share.decoder_processes and share.decoders == cpus
    shards, images = share.capacity(1024)
    assert shards >= 2 * share.decoders  # one is decoded while the next one is read
    assert images >= 2 * share.decoders * 1024
    assert not local_share(cpus, has_gpu=False).decoder_processes


def test_only_slots_with_gpus_have_decoder_processes() -> None:
    node = {"NodeID": "a", "Resources": {"CPU": 16, "GPU": 2}}
    assert [slot.share.decoder_processes for slot in share_out([node], "auto")] == [True] * 2
    assert [slot.share.decoder_processes for slot in share_out([node], "cpu")] == [False]
