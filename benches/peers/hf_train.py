#!/usr/bin/env python3
"""The peer of `moe-launch bench train`: Hugging Face Mixtral of the same shape, whole training steps; on a CPU in f32, on a GPU in bf16.

    pip install torch==2.11.0 transformers==5.17.0
    python3 benches/peers/hf_train.py --threads 2
    python3 benches/peers/hf_train.py --model moe-3b --device cuda

A step is forward, backward and AdamW (fused) on one batch of random tokens, timed after three that are not; the figure is the
median. Both of transformers' expert implementations are measured, since neither is faster everywhere. One JSON object a line.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

SHAPES = {
    "moe-15m": dict(hidden=256, ffn=512, layers=4, heads=8, kv_heads=4, experts=8, top_k=2, vocab=4096, batch=8, seq=256),
    "moe-3b": dict(hidden=2048, ffn=1024, layers=8, heads=16, kv_heads=4, experts=64, top_k=8, vocab=32000, batch=8, seq=2048),
}


def build(shape, experts_implementation, device):
    config = MixtralConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
        vocab_size=shape["vocab"],
        max_position_embeddings=4096,
        sliding_window=None,
    )
    config._experts_implementation = experts_implementation
    # On a GPU all of its state is bf16, as users of transformers train it. Made where it is used: a CPU takes a minute to draw it.
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        return MixtralForCausalLM(config).train()


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def step_seconds(model, shape, device, warmup, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, shape["vocab"], (shape["batch"], shape["seq"]), device=device)
    times = []
    for step in range(warmup + steps):
        wait(device)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        if step >= warmup:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="moe-15m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.model]
    tokens = shape["batch"] * shape["seq"]
    for implementation in ("grouped_mm", "eager"):
        seconds = step_seconds(build(shape, implementation, args.device), shape, args.device, warmup=3, steps=args.steps)
        figure = {"model": args.model, "experts": implementation, "device": args.device, "threads": args.threads}
        print(json.dumps(figure | {"tokens_per_s": round(tokens / seconds), "step_ms": round(seconds * 1e3, 1)}), flush=True)


if __name__ == "__main__":
    main()
