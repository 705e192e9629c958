#!/usr/bin/env python3
"""NCCL's all-to-all through PyTorch beside `moe-launch bench collectives --collective all_to_all_v`, on the GPUs of one machine.

    python3 benches/peers/torch_collectives.py --ranks 2 [--ours target/release/moe-launch]

Sizes are those that our side prints with --json. Both sides begin every run together, take the median of 15 runs after 4 by the device's
clock, and count the slowest rank; bus bandwidth is bytes · (ranks - 1) / ranks over the time. Ours runs before and after the peer.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def ours(args):
    command = ["mpirun", "--allow-run-as-root", "-n", str(args.ranks), args.ours]
    command += ["bench", "collectives", "--collective", "all_to_all_v", "--device", "cuda", "--json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))["cases"]


def one_rank(rank, ranks, sizes, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    medians = []
    for size in sizes:
        send = torch.randn(size // 2, device="cuda").bfloat16()
        recv = torch.empty_like(send)
        times = []
        for run in range(4 + 15):
            dist.barrier()
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            dist.all_to_all_single(recv, send)
            end.record()
            torch.cuda.synchronize()
            if run >= 4:
                times.append(start.elapsed_time(end))
        slowest = torch.tensor(statistics.median(times), device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        medians.append(slowest.item())
    if rank == 0:
        with open(out, "w") as file:
            json.dump(medians, file)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--ours", default="target/release/moe-launch")
    args = parser.parse_args()
    before = ours(args)
    sizes = [case["bytes"] for case in before]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "peer.json")
        mp.spawn(one_rank, (args.ranks, sizes, out), nprocs=args.ranks)
        with open(out) as file:
            peer = json.load(file)
    after = ours(args)
    print(f"{'MiB':>9}{'ours us':>11}{'again':>11}{'peer us':>11}{'ours GB/s':>11}{'peer GB/s':>11}{'ratio':>8}")
    for one, ms, two in zip(before, peer, after):
        us = (one["us"] + two["us"]) / 2
        bus = one["bytes"] * (args.ranks - 1) / args.ranks
        row = f"{one['bytes'] / 2**20:>9.2f}{one['us']:>11.1f}{two['us']:>11.1f}{1e3 * ms:>11.1f}"
        print(f"{row}{bus / us / 1e3:>11.1f}{bus / ms / 1e6:>11.1f}{1e3 * ms / us:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
