"""A step of several processes on this machine under DeepSpeed, gloo or nccl between them."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.engine_overhead import Engine
from bench.rounds import WHOLE, Clock, quantiles, time_all
from bench.variants import OURS
from bench.volume import CountingCollectives
from bench.workload import BATCHES, Shape, random_dataset
from fastmmkd.blocks import Config
from fastmmkd.engine.device import place, prepare_process, start_deepspeed
from fastmmkd.engine.step import untrained_objective


def measure(config: Config, shape: Shape, count: int, runs: int) -> dict[str, Any]:
    """Time steps of `count` processes with the config's batch each, the threads of this one divided among them.

    Returns:
        `{"ours": quantiles, "samples": of all processes in a step, "volume": of a step, see bench.volume}`.
    """
    times, said = _in_processes(config, shape, count, runs)
    return {OURS: times, "samples": count * config.train.batch_size, "volume": said["volume"]}


def volume(config: Config, shape: Shape, count: int) -> dict[str, Any]:
    """Count what `count` processes that share the config's batch send each other in a step.

    Returns:
        `{"parameters": of the model, "volume": see bench.volume}`.
    """
    own = config.train.model_copy(update={"batch_size": config.train.batch_size // count})
    return _in_processes(config.model_copy(update={"train": own}), shape, count, 1)[1]


def _in_processes(config: Config, shape: Shape, count: int, runs: int) -> tuple[dict[str, float], dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    mp.spawn(_process, (count, port, threads, config, shape, runs, queue), nprocs=count)
    times, said = queue.get()
    return times, said


def _process(
    rank: int, count: int, port: int, threads: int, config: Config, shape: Shape, runs: int, queue: Any
) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in (world | {"OMP_NUM_THREADS": threads}).items()})
    torch.set_num_threads(threads)
    prepare_process(config)
    placement = place(config)
    dataset = random_dataset(config, shape, BATCHES * config.train.batch_size)
    objective = untrained_objective(config, dataset, [1], placement.device, placement.dtype)
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "deepspeed.log"
        deepspeed = start_deepspeed(placement, log_file)
        block = placement.deepspeed | {"train_batch_size": count * config.train.batch_size}
        engine = Engine(config, objective, block, deepspeed, log_file)
        seconds = time_all({OURS: engine}, runs, placement.device)
        collectives = CountingCollectives()
        with collectives:
            engine(0, Clock(placement.device))
        if rank == 0:
            parameters = sum(p.numel() for p in objective.module.parameters() if p.requires_grad)
            said = {"parameters": parameters, "volume": collectives.volume}
            queue.put((quantiles(seconds[OURS][WHOLE]), said))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
