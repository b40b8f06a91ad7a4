#!/usr/bin/env python3
"""How exact PyTorch's bf16 attention is, forward and backward: the bars of test_olmoe's "kernel flash attention sdpa".

Writes a safetensors file without tensors. Its metadata hold, for each head size D and length T, the relative L2 errors
of scaled_dot_product_attention in bf16 on this CPU against float64, from the same bf16 inputs: "D64 T63 out", and dq,
dk, dv.

  reference_attention.py --out tests/fixtures/attention.safetensors
"""
import argparse

from reference import F, torch, write_safetensors

SHAPES = [(D, T) for D in (64, 128) for T in (63, 257, 1000)]


def numbers(array, T, D):
    """(T, D), the array's number: multiples of 1/64 in [-2, 2), which bf16 holds, as test_olmoe makes them, too."""
    mask = 0xffffffff
    bits = (torch.arange(T * D) + (array << 24)) * 2654435761 & mask
    bits = (bits ^ bits >> 15) * 2246822519 & mask
    return (((bits >> 13 & 255) - 128) / 64).reshape(T, D)


def run(inputs, dout, dtype):
    """out, dq, dk, dv of causal attention of one head, in float64."""
    q, k, v = (x.to(dtype)[None, None].requires_grad_() for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.backward(dout.to(dtype)[None, None])
    return [x.detach().double() for x in (out, q.grad, k.grad, v.grad)]


def errors():
    """The metadata."""
    found = {}
    for D, T in SHAPES:
        *inputs, dout = (numbers(array, T, D) for array in range(4))
        exact, rounded = run(inputs, dout, torch.float64), run(inputs, dout, torch.bfloat16)
        for name, a, b in zip(("out", "dq", "dk", "dv"), rounded, exact):
            found[f"D{D} T{T} {name}"] = f"{((a - b).norm() / b.norm()).item():.4e}"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", required=True)
    write_safetensors(parser.parse_args().out, {}, errors())
