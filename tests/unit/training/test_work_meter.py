"""Progress within a step."""

from __future__ import annotations

import torch

from vitray.training.activity import Activity, Phase
from vitray.training.work_meter import WorkMeter


def test_blocks_report_within_a_step_and_change_no_gradient() -> None:
    blocks = [torch.nn.Linear(4, 4) for _ in range(4)]
    for block in blocks[:2]:
        block.requires_grad_(False)
    learning = {id(parameter) for block in blocks[2:] for parameter in block.parameters()}
    network = torch.nn.Sequential(*blocks)
    images = torch.ones(3, 4)
    network(images).sum().backward()
    expected = [parameter.grad.clone() for parameter in blocks[2].parameters()]
    network.zero_grad()
    meter = WorkMeter(blocks, learning)
    seen: list[Activity] = []
    meter.watch = seen.append
    meter.start(Phase.TRAINING, 10, 40)
    meter.begin(16, meter.step_units, "step 1")
    network(images).sum().backward()
    meter.end()
    # 4 units forward, then 2 for each of the 2 blocks that learn
    assert meter.step_units == 8
    assert [each.done for each in seen] == [10, 10, 12, 14, 16, 18, 22, 26, 26]
    assert seen[-1].share == 26 / 40 and seen[-1].detail == "step 1"
    assert all(
        torch.equal(parameter.grad, wanted)
        for parameter, wanted in zip(blocks[2].parameters(), expected)
    )
