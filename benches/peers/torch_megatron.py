#!/usr/bin/env python3
"""PyTorch's MoE layer (NCCL all-to-all, grouped GEMM, GELU experts without a gate) beside `bench layer --megatron`, shape after shape.

    torchrun --nproc_per_node=4 benches/peers/torch_megatron.py

Shapes and method are those of Megatron-LM's moe_perf: 4096 tokens a GPU, forward and backward by events, the mean of 20 after 5, products in
front of each run. Random tokens choose experts about evenly, as its forced balance has them do.
"""

import json
import os
import statistics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd as exchange

SHAPES = {"mixtral": (4096, 4096, 14336, 8, 2), "deepseek": (4096, 7168, 2048, 32, 8)}
ALIGNED = 16  # rows of a group that torch._grouped_mm wants to begin at


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02)


class Layer(torch.nn.Module):
    def __init__(self, h, f, experts, top_k, ranks):
        super().__init__()
        self.experts, self.top_k, self.ranks, self.local = experts, top_k, ranks, experts // ranks
        self.router, self.up, self.down = parameter(h, experts), parameter(self.local, h, f), parameter(self.local, f, h)

    def forward(self, x):
        weights, chosen = torch.softmax((x @ self.router).float(), -1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = torch.argsort(chosen.flatten(), stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.experts)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts)
        sent, received = (c.view(self.ranks, -1).sum(1).tolist() for c in (counts, coming))
        rows = exchange(x[order // self.top_k], received, sent, dist.group.WORLD)
        expert = torch.arange(self.local, device=x.device).repeat(self.ranks)
        expert, by_expert = expert.repeat_interleave(coming, output_size=sum(received)).sort(stable=True)
        groups = coming.view(self.ranks, self.local).sum(0)
        padded = (groups + ALIGNED - 1) // ALIGNED * ALIGNED
        begins, ends = padded.cumsum(0) - padded, padded.cumsum(0)
        place = begins[expert] + torch.arange(len(expert), device=x.device) - (groups.cumsum(0) - groups)[expert]
        grouped = torch.zeros(sum(received) + ALIGNED * self.local, x.shape[1], device=x.device, dtype=x.dtype)
        grouped = grouped.index_copy(0, place, rows[by_expert])
        y = torch._grouped_mm(F.gelu(torch._grouped_mm(grouped, self.up, offs=ends.int())), self.down, offs=ends.int())
        home = exchange(torch.empty_like(rows).index_copy(0, by_expert, y[place]), sent, received, dist.group.WORLD)
        out = torch.zeros(x.shape[0] * self.top_k, x.shape[1], device=x.device, dtype=x.dtype).index_copy(0, order, home)
        return (out.view(x.shape[0], self.top_k, -1) * weights.unsqueeze(-1).to(x.dtype)).sum(1)


def means(layer, x):
    a, sum_to_meet = torch.randn(8192, 8192, device="cuda").bfloat16(), torch.zeros(1, device="cuda")
    times = []
    for run in range(5 + 20):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        x.grad = None
        layer.zero_grad(set_to_none=True)
        for _ in range(3):
            a @ a
        dist.all_reduce(sum_to_meet)
        marks[0].record()
        y = layer(x)
        marks[1].record()
        dy = torch.randn_like(y)
        marks[2].record()
        y.backward(dy)
        marks[3].record()
        torch.cuda.synchronize()
        if run >= 5:
            times.append((marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])))
    return [statistics.mean(column) for column in zip(*times)]


def main():
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    for name, (t, h, f, experts, top_k) in SHAPES.items():
        x = torch.randn(t, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        mine = torch.tensor(means(Layer(h, f, experts, top_k, ranks), x), device="cuda")
        slowest = mine.clone()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if rank == 0:
            times = {"rank_0_ms": mine.tolist(), "slowest_ms": slowest.tolist()}
            print(json.dumps({"layer": name, "ranks": ranks, "passes": ["forward", "backward"], **times}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
