"""Processes of one group on this machine, which run the same cases in the same order."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds in which a rank waits for the others


def _rank(module: str, rank: int, ranks: int, port: int, folder: Path) -> None:
    """A case that fails ends the process, and with it the wait of the others."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    results: dict[str, str] = {}
    for name, case in importlib.import_module(module).CASES.items():
        results[name] = f"rank {rank} ended in it"
        (folder / f"{rank}.json").write_text(json.dumps(results))
        try:
            torch.manual_seed(0)
            case()
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            os._exit(1)
    os._exit(0)  # not every group can be taken down any more


def run(module: str, ranks: int, folder: Path) -> dict[str, dict[int, str]]:
    """What each rank says of each case in a module's CASES: "" where it passed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    arguments = [(module, rank, ranks, store.port, folder) for rank in range(ranks)]
    processes = [spawn.Process(target=_rank, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results: dict[str, dict[int, str]] = {}
    for rank in range(ranks):
        file = folder / f"{rank}.json"
        for name, text in (json.loads(file.read_text()) if file.exists() else {}).items():
            results.setdefault(name, {})[rank] = text
    return results
