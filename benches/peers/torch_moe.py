#!/usr/bin/env python3
"""PyTorch's grouped GEMM and a MoE layer made of it, beside `moe-launch bench gemm` and `bench layer` on one GPU, case after case in turn.

    python3 benches/peers/torch_moe.py gemm  [--ours target/release/moe-launch]
    python3 benches/peers/torch_moe.py layer [--ours target/release/moe-launch]

Shapes, groups and counting rules are those that our side prints with --json. Both sides are the median of 15 runs after 4, by the
device's clock, and of three rounds in which they take turns. The peer's weight gradients are bf16 and replace what was there; ours are
f32 and replace (`weight_grad`). Where the peer's layer pads groups to 16 rows, as `torch._grouped_mm` wants them, the padding is not
counted.
"""

import argparse
import json
import math
import statistics
import subprocess

import torch

ROUNDS = 3  # of each side
ALIGNED = 16  # rows of a group that torch._grouped_mm wants to begin at


def median_ms(work, repeats=15, warmup=4):
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bf16(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def group_ends(groups, rows, skew):
    """Rows of multinomial groups over a softmax of skew · normal logits, in multiples of 16, as running sums."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.softmax(torch.randn(groups, generator=generator) * skew, 0)
    picked = torch.multinomial(shares, rows // ALIGNED, replacement=True, generator=generator)
    return (picked.bincount(minlength=groups) * ALIGNED).cumsum(0).int().cuda()


def torch_gemm(case):
    e, m, k, n = (case[name] for name in "EMKN")
    ends = group_ends(e, m, case["skew"])
    x, w, dy = bf16(m, k), bf16(e, n, k, scale=0.02), bf16(m, n)
    flops = 2 * m * n * k
    passes = {
        "forward": lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
        "input_grad": lambda: torch._grouped_mm(dy, w, offs=ends),
        "weight_grad": lambda: torch._grouped_mm(dy.t(), x, offs=ends),
    }
    return {name: flops / median_ms(work) / 1e9 for name, work in passes.items()}


class Layer(torch.nn.Module):
    """Softmax top-k router, permutation by expert, SwiGLU experts as grouped GEMM, weighted sum; nothing is dropped."""

    def __init__(self, h, f, experts, top_k):
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = torch.nn.Parameter(bf16(h, experts, scale=0.02))
        self.gate, self.up = (torch.nn.Parameter(bf16(experts, h, f, scale=0.02)) for _ in range(2))
        self.down = torch.nn.Parameter(bf16(experts, f, h, scale=0.02))

    def forward(self, x):
        weights, chosen = torch.softmax((x @ self.router).float(), -1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        expert, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.experts)
        ends = ((counts + ALIGNED - 1) // ALIGNED * ALIGNED).cumsum(0)
        begins = ends - (counts + ALIGNED - 1) // ALIGNED * ALIGNED
        place = begins[expert] + torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts)[expert]
        rows = x.new_zeros(len(expert) + ALIGNED * self.experts, x.shape[1]).index_copy(0, place, x[order // self.top_k])
        ends = ends.int()
        hidden = torch.nn.functional.silu(torch._grouped_mm(rows, self.gate, offs=ends))
        hidden = hidden * torch._grouped_mm(rows, self.up, offs=ends)
        out = torch.empty_like(rows[: len(order)]).index_copy(0, order, torch._grouped_mm(hidden, self.down, offs=ends)[place])
        return (out.view(len(x), self.top_k, -1) * weights.unsqueeze(-1).to(x.dtype)).sum(1)


def torch_layer(case):
    t, h, f = case["T"], case["H"], case["F"]
    layer, x = Layer(h, f, case["E"], case["k"]), bf16(t, h).requires_grad_()
    dout = bf16(t, h)

    def forward():
        with torch.no_grad():
            layer(x)

    def both():
        layer(x).backward(dout)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    flops = 6 * t * case["k"] * h * f
    return {"fwd_tflops": flops / median_ms(forward) / 1e9, "fwd_bwd_tflops": 3 * flops / median_ms(both) / 1e9}


def ours(program, kind, name):
    command = [program, "bench", kind, "--device", "cuda", "--json", "--case", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


NAMES = {
    "gemm": "mixtral-up mixtral-down dsv3-up dsv3-down qwen3-up qwen3-down olmoe-up olmoe-down deepseek-up".split(),
    "layer": "mixtral-8x7b qwen3-30b-a3b deepseek-moe-16b olmoe-1b-7b deepseek-v3-slice".split(),
}


def in_turn(program, kind, name):
    """Reports of our side and rates of the peer for the cases of a name, ROUNDS of each. Who begins changes from round to round, so that
    neither always has the GPU as the other left it."""
    peer = {"gemm": torch_gemm, "layer": torch_layer}[kind]
    reports, peers = [], []

    def our_turn():
        reports.append(ours(program, kind, name))

    def peers_turn():
        peers.append([peer(case) for case in reports[0]["cases"]])
        torch.cuda.empty_cache()

    for number in range(ROUNDS):
        for turn in (our_turn, peers_turn) if number % 2 == 0 else (peers_turn, our_turn):
            turn()
    return reports, peers


def rates(kind, case):
    return {key: case[key]["tflops"] for key in ("forward", "input_grad", "weight_grad")} if kind == "gemm" else case


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=NAMES)
    parser.add_argument("--ours", default="target/release/moe-launch", metavar="PROGRAM")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: TFLOP/s of ours / PyTorch's = ratio, medians of {ROUNDS} in turn")
    ratios = []
    for name in NAMES[args.kind]:
        reports, peers = in_turn(args.ours, args.kind, name)
        for i, case in enumerate(reports[0]["cases"]):
            mine = [rates(args.kind, report["cases"][i]) for report in reports]
            if args.kind == "gemm":
                title = f"{name} skew {case['skew']}"
            else:
                fractions = [report["cases"][i]["fraction_of_dense"] for report in reports]
                dense = statistics.median(report["dense_tflops"] for report in reports)
                title = f"{name} ({statistics.median(fractions):.3f} of dense {dense:.0f}, {min(fractions):.3f} to {max(fractions):.3f})"
            figures = []
            for key in peers[0][i]:
                our_rate = statistics.median(rate[key] for rate in mine)
                peer_rate = statistics.median(rate[i][key] for rate in peers)
                ratios.append(our_rate / peer_rate)
                figures.append(f"{key} {our_rate:.0f}/{peer_rate:.0f}={ratios[-1]:.2f}")
            print(f"{title:<60}" if args.kind == "layer" else f"{title:<24}", "  ".join(figures), flush=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of the ratios {mean:.3f}, smallest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
