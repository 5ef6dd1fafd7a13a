"""Train the text model of `train_text_model.py` over several processes in four ways, beside one process.

    torchrun --standalone --nproc-per-node 2 examples/distributed_training.py            # some minutes on two cores
    torchrun --standalone --nproc-per-node 2 examples/distributed_training.py --quick    # half a minute

The four ways are DDP and FSDP2, where each process takes a part of the batch; tensor parallelism, where each takes some
of the heads and of the hidden features; and ring attention, where each takes a part of every sequence. The models start
from one seed and see the same batches, so that their losses must be those of one process, within rounding. The table
shows them side by side. The exit status is 1 if they differ by more than 1e-3 in the first 50 steps.

With GPUs, one for each process, the same lines run on them by NCCL.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_mha
from fused_mha.parallel import HeadwiseParallel, context_parallel, shard

from train_text_model import (
    FIRST_STEPS,
    FIRST_STEPS_LIMIT,
    TextModel,
    exit_status,
    parse_with_quick,
    positive,
    seed_number,
    standard_library_text,
)

QUICK = {"steps": 6, "batch_size": 4, "context": 32, "embed_dim": 32, "characters": 100_000}


class SequenceModel(TextModel):
    """`TextModel` for any part of a sequence: codes (N, L) and their places (L), if they are not the first."""

    def forward(self, codes: Tensor, places: Tensor | None = None) -> Tensor:
        if places is None:
            places = torch.arange(codes.shape[1], device=codes.device)
        x = self.characters(codes) + self.positions(places)
        return self.next_character(self.encoder(x, is_causal=True))  # ours needs no mask beside it


def alone(model: SequenceModel, mesh: DeviceMesh) -> nn.Module:
    """The whole model on the whole batch, in every process."""
    return model


def by_ddp(model: SequenceModel, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def by_fsdp(model: SequenceModel, mesh: DeviceMesh) -> nn.Module:
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_heads(model: SequenceModel, mesh: DeviceMesh) -> nn.Module:
    layer = {"self_attn": HeadwiseParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    return parallelize_module(model, mesh, {f"encoder.layers.*.{name}": style for name, style in layer.items()})


def by_ring(model: SequenceModel, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(context_parallel(model, mesh), process_group=mesh.get_group())


class Way(NamedTuple):
    """How a model is spread, and of what each process takes a part: "batch", "sequence" or nothing."""

    spread: Callable[[SequenceModel, DeviceMesh], nn.Module]
    part_of: str | None


WAYS = {
    "one process": Way(alone, None),
    "DDP": Way(by_ddp, "batch"),
    "FSDP2": Way(by_fsdp, "batch"),
    "heads": Way(by_heads, None),
    "ring": Way(by_ring, "sequence"),
}


class Training:
    """One model and its losses over the whole batch."""

    def __init__(self, way: Way, make: Callable[[], SequenceModel], mesh: DeviceMesh, learning_rate: float) -> None:
        self.way, self.mesh = way, mesh
        self.losses: list[float] = []
        self._model = way.spread(make(), mesh)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate, foreach=False)

    def step(self, codes: Tensor) -> None:
        inputs, targets = codes[:, :-1], codes[:, 1:]
        places = torch.arange(inputs.shape[1], device=codes.device)
        if self.way.part_of == "batch":
            size, rank = self.mesh.size(), self.mesh.get_local_rank()
            inputs, targets = inputs.chunk(size)[rank], targets.chunk(size)[rank]
        elif self.way.part_of == "sequence":
            inputs, targets = shard(inputs, self.mesh), shard(targets, self.mesh)
            places = shard(places, self.mesh, dim=0)
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._model(inputs, places).flatten(0, 1), targets.flatten())
        loss.backward()
        self._optimizer.step()
        loss = loss.detach()
        if self.way.part_of is not None:
            dist.all_reduce(loss, group=self.mesh.get_group())
            loss /= self.mesh.size()
        self.losses.append(loss.item())


def largest_differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """How far the losses of each way lie from those of one process, in the first steps."""
    expected = losses["one process"][:FIRST_STEPS]
    return {
        name: max(abs(a - b) for a, b in zip(expected, found, strict=False))
        for name, found in losses.items()
        if name != "one process"
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=200, help="of each training (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, help="(default: %(default)s)")
    parser.add_argument("--context", type=positive, default=128, help="characters seen (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--embed-dim", type=positive, default=128, help="(default: %(default)s)")
    parser.add_argument("--heads", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--characters", type=positive, default=1_000_000, help="of the text (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of parameters and batches (default: %(default)s)")
    options = parse_with_quick(parser, QUICK, arguments)
    size = int(os.environ.get("WORLD_SIZE", "0"))
    if not size:
        parser.error(
            "start this by torchrun: torchrun --standalone --nproc-per-node 2 examples/distributed_training.py"
        )
    for name, number, divisor in (
        ("--batch-size", options.batch_size, size),
        ("--heads", options.heads, size),
        ("--context", options.context, 2 * size),
        ("--embed-dim", options.embed_dim, options.heads),
    ):
        if number % divisor:
            parser.error(f"{name} must be a multiple of {divisor} for {size} processes; got {number}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    # FSDP2 warns of every model that ends with an nn.Linear; nothing is done in place to its output here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("ranks",))
    text = standard_library_text(options.characters)

    def make() -> SequenceModel:
        torch.manual_seed(options.seed)
        sizes = (options.context, options.layers, options.embed_dim, options.heads)
        model = SequenceModel(len(text.vocabulary), *sizes)
        fused_mha.convert(model)
        return model.to(device)

    trainings = {name: Training(way, make, mesh, options.learning_rate) for name, way in WAYS.items()}
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.context + 1)
    speaks = mesh.get_local_rank() == 0
    if speaks:
        print(f"losses, {mesh.size()} processes\n  step" + "".join(f"{name:>14}" for name in trainings))
    for step in range(options.steps):
        starts = torch.randint(len(text.codes) - options.context, (options.batch_size, 1), generator=generator)
        codes = text.codes[starts + offsets].to(device)
        for training in trainings.values():
            training.step(codes)
        if speaks and (step == 0 or (step + 1) % max(1, options.steps // 10) == 0):
            row = "".join(f"{training.losses[-1]:>14.6f}" for training in trainings.values())
            print(f"{step + 1:>6}{row}", flush=True)
    differences = largest_differences({name: training.losses for name, training in trainings.items()})
    agree = all(difference <= FIRST_STEPS_LIMIT for difference in differences.values())
    if speaks:
        first = min(FIRST_STEPS, options.steps)
        row = "".join(f"{difference:>14.1e}" for difference in differences.values())
        print(f"\nlargest difference from one process in the first {first} steps, of {FIRST_STEPS_LIMIT:g} allowed")
        print(f"{'they agree' if agree else 'THEY DIFFER':<20}{row}")
    return 0 if agree else 1


if __name__ == "__main__":
    status = exit_status(main)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
