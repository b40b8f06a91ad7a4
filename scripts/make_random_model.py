#!/usr/bin/env python3
"""Writes a model directory laid out as allenai/OLMoE-1B-7B-0924 is published, with random weights.

config.json with the fields of the published one, generation_config.json, bf16 shards of at most --shard-bytes with the
hub's names, a tensor for each expert and matrix, and their index. A tensor is drawn, written and dropped, so that the
full size, 13.8 GB on the disk, takes less than 1 GB of memory. The weights keep activations near one, and the router's
logits spread by 2, so that routing is decisive. A tensor's numbers follow from --seed and its name alone, whatever the
other tensors are.

  make_random_model.py --out DIR                                      the full size, in 2 to 3 minutes
  make_random_model.py --out DIR --config configs/tiny.json           any other shape
"""
import argparse
import json
import os
import shutil
import struct
import sys
import zlib

try:
    import numpy as np
except ImportError:
    sys.exit("make_random_model.py: needs numpy (Debian: python3-numpy)")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PIECE = 1 << 22     # numbers drawn at a time

# What the published config.json holds besides the shape; it leaves rms_norm_eps to its default.
PUBLISHED = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "olmoe", "norm_topk_prob": False,
    "output_router_logits": False, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True}
SHAPE = ("eos_token_id", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
         "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "pad_token_id", "vocab_size")


def die(message):
    sys.exit(f"make_random_model.py: {message}")


def tensors(c):
    """Name and shape of each tensor, in the order in which transformers shards them."""
    C, V, E, F = c["hidden_size"], c["vocab_size"], c["num_experts"], c["intermediate_size"]
    yield "model.embed_tokens", (V, C)
    for l in range(c["num_hidden_layers"]):
        layer = f"model.layers.{l}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield layer + "self_attn." + name, (C, C)
        yield layer + "self_attn.q_norm", (C,)
        yield layer + "self_attn.k_norm", (C,)
        yield layer + "mlp.gate", (E, C)
        for e in range(E):
            yield f"{layer}mlp.experts.{e}.gate_proj", (F, C)
            yield f"{layer}mlp.experts.{e}.up_proj", (F, C)
            yield f"{layer}mlp.experts.{e}.down_proj", (C, F)
        yield layer + "input_layernorm", (C,)
        yield layer + "post_attention_layernorm", (C,)
    yield "model.norm", (C,)
    yield "lm_head", (V, C)


def numbers(name, shape, seed):
    """The tensor's numbers in bf16, a piece at a time."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if "norm" in name:
        spread = 0.2
    elif "embed" in name:
        spread = 1.0
    else:
        spread = (2.0 if name.endswith("mlp.gate") else 1.0) / shape[-1] ** 0.5
    for begin in range(0, int(np.prod(shape)), PIECE):
        x = random.standard_normal(min(PIECE, int(np.prod(shape)) - begin), dtype=np.float32)
        x *= np.float32(spread)
        if "norm" in name:
            x += np.float32(1)
        bits = x.view(np.uint32)
        bits += 0x7fff + (bits >> 16 & 1)       # to the nearest, ties to even
        yield (bits >> 16).astype("<u2")


def write(out, config, seed, shard_bytes):
    shards, size = [[]], 0
    for name, shape in tensors(config):
        bytes = 2 * int(np.prod(shape))
        if shards[-1] and size + bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += bytes
    total, weight_map = 0, {}
    for s, shard in enumerate(shards):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{s + 1:05}-of-{len(shards):05}.safetensors"
        # as the safetensors library orders tensors of one dtype
        shard.sort(key=lambda tensor: tensor[0] + ".weight")
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name + ".weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name + ".weight"] = file_name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(out, file_name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in shard:
                for piece in numbers(name, shape, seed):
                    file.write(piece.data)
        total += end
        if sys.stderr.isatty():
            print(f"{file_name}: {(8 + len(text) + end) / 1e9:.2f} GB", file=sys.stderr)
    generation = {"_from_model_config": True, "eos_token_id": config["eos_token_id"],
                  "pad_token_id": config["pad_token_id"], "transformers_version": config["transformers_version"]}
    texts = {"config.json": config, "generation_config.json": generation}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {"metadata": {"total_size": total},
                                                 "weight_map": dict(sorted(weight_map.items()))}
    for name, content in texts.items():
        with open(os.path.join(out, name), "w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
    return len(weight_map), total, len(shards)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", required=True, help="the directory to make; must not exist")
    parser.add_argument("--config", metavar="FILE", default=os.path.join(ROOT, "configs", "olmoe-1b-7b.json"),
                        help="the shape; default %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9,
                        help="of tensors in a file; default %(default)s, as published")
    o = parser.parse_args()
    if os.path.exists(o.out):
        die(f"{o.out} exists; remove it or choose another --out")
    try:
        with open(o.config) as file:
            given = json.load(file)
        config = {**PUBLISHED, **{key: given[key] for key in SHAPE}}
    except (OSError, ValueError, KeyError) as error:
        die(f"{o.config}: {error!r}; --config takes a config.json of an OLMoE")
    for key, default in (("norm_topk_prob", False), ("rope_theta", 10000.0), ("rms_norm_eps", 1e-5)):
        if given.get(key, default) != default:
            config[key] = given[key]
    config = dict(sorted(config.items()))
    building = o.out.rstrip("/") + ".tmp"
    needed = sum(2 * int(np.prod(shape)) for _, shape in tensors(config))
    try:
        shutil.rmtree(building, ignore_errors=True)
        os.makedirs(building)
        free = shutil.disk_usage(building).free
        if free < needed * 1.01:
            die(f"{o.out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        count, total, files = write(building, config, o.seed, o.shard_bytes)
        os.rename(building, o.out)
    except OSError as error:
        die(f"{o.out}: {error.strerror or error}; nothing was kept")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"{o.out}: {count} tensors, {total} bytes in {files} file{'s' if files > 1 else ''}, seed {o.seed}")


if __name__ == "__main__":
    main()
