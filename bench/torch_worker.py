"""One process of a row of PyTorch: `worker.py` for BP on schedules of `torch.distributed`.

Argument and commands are those of `worker.py`; several processes are ranks of Gloo or, where there
are GPUs, of NCCL. The weights are those with which ours begin, and so are the batches.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import struct
import time
from typing import Any

import jax
import numpy as np
import torch
import torch.distributed as dist
import torch_nets
import worker
from peers_torch import WholeUnit, configure, cross_entropy, tensors
from rows import TORCH_SCHEDULES
from torch import nn

import jdecouple as jd

_SIOCGIFADDR = 0x8915
CUDA = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"


def initialize(
    coordinator: str,
    num_processes: int,
    process_id: int,
    transfer_port: int | None = None,
    address: str = "127.0.0.1",
) -> None:
    """Joins the processes; the arguments are those of ours."""
    del transfer_port
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface(address))
    if CUDA:
        torch.cuda.set_device(process_id)
    dist.init_process_group(
        "nccl" if CUDA else "gloo",
        init_method=f"tcp://{coordinator}",
        world_size=num_processes,
        rank=process_id,
    )


def interface(address: str) -> str:
    """Name of the network device that has an IPv4 address; RuntimeError if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):  # it has no address
                if fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24] == socket.inet_aton(address):
                    return name
    raise RuntimeError(f"no network device has the address {address}")


class Run:
    """A net of one process, or its part of it, with an optimiser, and batches on the device.

    The options are those of `worker.Run` and of `rows.TorchRow.options`; others do not count.
    """

    def __init__(self, options: dict[str, Any]):
        name, hidden, depth = options["model"], options["hidden"], options["depth"]
        self._schedule, self._parts = options["schedule"], options["data"]
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._device = torch.device("cuda", self._rank) if CUDA else torch.device("cpu")
        model, shape = worker.build_model(name, hidden, depth)
        batches = worker.build_batches(options["batch"], shape, name == "gpt")
        trainer = jd.Trainer(model, jd.methods.get("bp"), jd.optim.sgd(0.01), example=batches[0])
        arrays = {name: np.asarray(x) for name, x in trainer.to_arrays(trainer.init()).items()}
        del trainer
        if name == "mlp":
            net = torch_nets.mlp(worker.NUM_CLASSES, input_size=hidden, hidden=hidden, depth=depth)
        elif name == "gpt":
            net = torch_nets.gpt(
                worker.VOCABULARY, hidden=hidden, depth=depth, context=worker.LENGTH
            )
        else:
            size = {"image_size": worker.IMAGE_SIZE, "channels": hidden}
            net = torch_nets.vgg(worker.NUM_CLASSES, [[hidden, hidden]] * depth, **size)
        blocks, classifier = net
        modules: dict[str, nn.Module] = {
            f"block_{i}/block": block for i, block in enumerate(blocks)
        }
        head = {"classifier": classifier}  # which is in another head where labels are of positions
        modules[f"block_{depth - 1}/head"] = nn.ModuleDict({**head, "head": nn.ModuleDict(head)})
        torch_nets.load(modules, arrays)
        self._uploaded = itertools.cycle([self._own(batch) for batch in batches])
        self._pipeline: Any = None
        if TORCH_SCHEDULES[self._schedule].name:
            self._build_stage(blocks, classifier, options)
        else:
            self._net: nn.Module = WholeUnit(blocks, classifier).to(self._device)
            self._call = self._net
            if self._schedule == "ddp" and dist.is_initialized():
                self._call = nn.parallel.DistributedDataParallel(self._net)
            elif self._schedule == "compiled":
                self._call = torch.compile(self._net)
        self._optimizer = torch.optim.SGD(self._net.parameters(), 0.01, momentum=0.9)
        self._half = options.get("dtype") == "bfloat16"

    def _own(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch on the device; under data parallelism this replica's part of it."""
        pair = (values.chunk(self._parts) for values in tensors(batch))
        return tuple(parts[self._rank % self._parts].to(self._device) for parts in pair)

    def _build_stage(
        self, blocks: list[nn.Module], classifier: nn.Module, options: dict[str, Any]
    ) -> None:
        from torch.distributed import pipelining
        from torch.distributed.pipelining.schedules import PipelineScheduleMulti

        count, groups, rank = options["stages"], options["groups"], self._rank
        name = TORCH_SCHEDULES[self._schedule].name
        numbers = [rank] if count == groups else [rank, count - 1 - rank]
        self._is_first, self._is_last = 0 in numbers, count - 1 in numbers
        parts = []
        for number in numbers:
            first, end = (k * len(blocks) // count for k in (number, number + 1))
            parts.append(nn.Sequential(*blocks[first:end]))
            if number == count - 1:
                parts[-1].append(classifier)
        self._net = nn.ModuleList(parts).to(self._device)
        stages = [
            pipelining.PipelineStage(part, number, count, self._device)
            for part, number in zip(parts, numbers, strict=True)
        ]
        schedule = getattr(pipelining, name)
        self._pipeline = schedule(
            stages if issubclass(schedule, PipelineScheduleMulti) else stages[0],
            options["microbatches"],
            loss_fn=cross_entropy,
        )

    def _train(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Trains on a batch: its loss, or this replica's share of it; None at earlier stages."""
        self._optimizer.zero_grad()
        half = torch.autocast(self._device.type, torch.bfloat16)
        with half if self._half else contextlib.nullcontext():
            if self._pipeline is None:
                _, loss = self._call(x, labels)
            else:
                losses: list[torch.Tensor] = []
                last = {"target": labels, "losses": losses} if self._is_last else {}
                self._pipeline.step(*((x,) if self._is_first else ()), **last)
                loss = torch.stack(losses).mean() if losses else None
        if self._pipeline is None:
            loss.backward()
        self._optimizer.step()
        return None if loss is None else loss.detach() / self._parts

    def run(self, steps: int) -> dict[str, Any]:
        """Trains on so many batches; the reply is that of `worker.Run.run`."""
        history = []
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            history.append(self._train(*next(self._uploaded)))
        if CUDA:
            torch.cuda.synchronize()
        end, processor = time.perf_counter(), time.process_time() - processor
        momenta = [x for state in self._optimizer.state.values() for x in state.values()]
        kept = [*self._net.parameters(), *self._net.buffers(), *momenta]
        losses = [float(loss) for loss in history if loss is not None]
        return {
            "start": start,
            "end": end,
            "processor": processor,
            "losses": {f"rank_{self._rank}/loss": losses} if losses else {},
            "cores": worker.cores(),
            "state": sum(x.nbytes for x in kept if isinstance(x, torch.Tensor)),
            "peak": torch.cuda.max_memory_allocated() if CUDA else None,
        }

    def digest(self) -> dict[str, str]:
        """Nothing is compared to the last bit."""
        return {}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # it only draws the weights
    configure("cuda" if CUDA else "cpu", max(1, len(worker.cores())), "tf32")
    worker.serve(initialize, Run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
