"""`torchrun --nproc_per_node W sharded_run.py FILE`: steps of a model whose weights torch's FSDP shards over W CPUs.

Writes the losses of the global batch into FILE as JSON; with one process nothing is sharded.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_ehm import EHMConfig, EHMForPreTraining

STEPS, IMAGES = 10, 8
MODEL = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def losses_of(world_size: int) -> list[float]:
    """Losses of some steps, means over all processes; masks from trees of the sharded weights."""
    torch.manual_seed(0)
    model, rank = EHMForPreTraining(EHMConfig(**MODEL)).train(), 0
    if world_size > 1:
        dist.init_process_group("gloo")
        rank, mesh = dist.get_rank(), init_device_mesh("cpu", (world_size,))
        for layer in (*model.ehm.layers, *model.decoder.decoder_layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        images = torch.rand(IMAGES, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        seeds = torch.arange(IMAGES) + step * IMAGES
        mine = slice(rank, None, world_size)
        loss = model(images[mine], progress=step / STEPS, mask_seed=seeds[mine]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world_size)
    if world_size > 1:
        assert any(type(weight).__name__ == "DTensor" for weight in model.parameters())
        dist.barrier()  # a process that leaves while others still talk to it is aborted
        dist.destroy_process_group()
    return losses if rank == 0 else []


if __name__ == "__main__":
    if losses := losses_of(int(os.environ.get("WORLD_SIZE", "1"))):
        Path(sys.argv[1]).write_text(json.dumps(losses))
