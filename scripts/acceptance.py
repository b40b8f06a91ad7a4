#!/usr/bin/env python3
"""Writes the published logits of allenai/OLMoE-1B-7B-0924 as a file for `olmoe verify`.

  acceptance.py [tests/fixtures/olmoe-1b-7b-0924.safetensors]

The numbers are those that transformers' own test of the released weights expects (test_model_7b_logits in
tests/models/olmoe/test_modeling_olmoe.py): for one sequence of eight tokens the mean logit at each position, and the
first 30 logits at the first. Its tolerance is 1e-2 + 1e-2 |x| for each number, and so is the file's. The numbers were
computed in fp32, as their digits show: no bf16 number is near -2.3874. A BF16 build rounds every logit to 8 bits and
every activation before it, and is compared by relative L2, bf16_rtol.
"""
import json
import os
import struct
import sys

INPUTS = [1, 306, 4658, 278, 6593, 310, 2834, 338]
MEAN = [-1.3814, -3.4450, -2.2990, -1.9542, -2.4387, -2.7941, -2.9312, -2.8309]
SLICE = [-2.3874, -2.4076, -2.4995, 4.2278, 1.4004, -0.0252, 0.4189, -2.7560, 0.3531, 1.6678, -0.7941, -1.1818,
         -0.2920, 0.7131, -1.4173, 1.6723, 0.5406, 0.1345, -0.1800, 0.2304, 1.2791, 0.7489, 0.6341, -0.0151,
         -1.3693, -1.2532, -2.3921, 0.7376, 1.6876, 0.5483]
METADATA = {"model": "allenai/OLMoE-1B-7B-0924", "rtol": "1e-2", "atol": "1e-2", "bf16_rtol": "3e-2"}
TENSORS = (("inputs", "I32", [1, 8], INPUTS), ("logits_mean", "F32", [1, 8], MEAN),
           ("logits_slice", "F32", [1, 1, 30], SLICE))
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    default = os.path.join(ROOT, "tests", "fixtures", "olmoe-1b-7b-0924.safetensors")
    path = sys.argv[1] if len(sys.argv) > 1 else default
    header, data = {"__metadata__": METADATA}, b""
    for name, dtype, shape, numbers in TENSORS:
        raw = struct.pack(f"<{len(numbers)}{'i' if dtype == 'I32' else 'f'}", *numbers)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    print(f"{path}: {8 + len(text) + len(data)} bytes")


if __name__ == "__main__":
    main()
