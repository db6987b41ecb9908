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
from bench.rounds import WHOLE, quantiles, time_all
from bench.variants import OURS
from bench.workload import BATCHES, Shape, random_dataset
from fastmmkd.blocks import Config
from fastmmkd.engine.device import place, prepare_process, start_deepspeed
from fastmmkd.engine.step import untrained_objective


def measure(config: Config, shape: Shape, count: int, runs: int) -> dict[str, Any]:
    """`count` processes with the config's batch each, the threads of this one divided among them.

    Returns:
        `{"ours": quantiles, "samples": of all processes in a step}`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    mp.spawn(_process, (count, port, threads, config, shape, runs, queue), nprocs=count)
    return {OURS: queue.get(), "samples": count * config.train.batch_size}


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
        if rank == 0:
            queue.put(quantiles(seconds[OURS][WHOLE]))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
