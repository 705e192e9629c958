#!/usr/bin/env python3
"""Exported folders opened by Hugging Face transformers: the logits of both, side by side.

    make test-transformers

For every folder below the one that is named: `from_pretrained` in f32, the logits of `input_ids` in `ours.bin`, and the largest
difference to the logits beside them. Fails where a difference is above 1e-4, where a tensor is left out or made up, or where
the tokenizer does not give back what it was given.
"""

import argparse
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
TEXT = "fn main() { println!(\"h\u00e9llo, \u4e16\u754c\"); }\n\t\0"


def compare(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    unloaded = {kind: sorted(names) for kind, names in info.items() if names}
    # A tied head is no tensor of its own.
    if model.config.tie_word_embeddings and unloaded.get("missing_keys") == ["lm_head.weight"]:
        del unloaded["missing_keys"]
    ours = load((folder / "ours.bin").read_bytes())
    with torch.no_grad():
        theirs = model.eval()(input_ids=ours["input_ids"].long()).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return {
        "model": folder.name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_logit": float(theirs.abs().max()),
        "largest_difference": float((theirs - ours["logits"]).abs().max()),
        "not_loaded": unloaded,
        "tokenizer": ids == list(TEXT.encode()) and tokenizer.decode(ids) == TEXT,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=pathlib.Path, help="folder of exported folders")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = sorted(path.parent for path in args.folders.glob("*/ours.bin"))
    if not found:
        sys.exit(f"error: {args.folders} holds no exported folder with an ours.bin")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)
    failed = 0
    for folder in found:
        result = compare(folder)
        good = result["largest_difference"] <= TOLERANCE and not result["not_loaded"] and result["tokenizer"]
        failed += not good
        print(json.dumps(result | {"passed": good}))
    if failed:
        sys.exit(f"error: {failed} of {len(found)} models differ")


if __name__ == "__main__":
    main()
