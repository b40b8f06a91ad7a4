#!/usr/bin/env python3
"""What PyTorch and transformers compute from a model that does not fit in memory at their precision, a layer at a time.

Reads a Hugging Face directory, such as OLMoE-1B-7B-0924 or one of make_random_model.py, and writes a file for
`olmoe verify --reference`: the logits, the router's logits and the chosen experts of a few short sequences in float32.
The file's metadata hold how far PyTorch's own bf16 runs, with eager and with sdpa attention, are from that:
  bf16_eager_logits, bf16_sdpa_logits      relative L2 of the logits
  bf16_eager_router, bf16_sdpa_router      relative L2 of the router's logits, of the worst layer
  bf16_eager_experts, bf16_sdpa_experts    share of all tokens and layers that choose other experts, in any order
A BF16 build of olmoe must be within 1.25 times the worse of each two.

The arithmetic is transformers': its whole model runs, on weights that exist only while a module of it works. That takes
the memory of one layer in float32 and in the file, 2.5 GB at full size.

  reference_layerwise.py --model DIR --out FILE.safetensors
"""
import argparse
import os
import time

from reference import OlmoeForCausalLM, die, forward, quiet, torch, transformers, write_safetensors
from safetensors import safe_open
from transformers import OlmoeConfig


class Weights:
    """The tensors of a directory's safetensors files, by name. Open files map what was read of them, until drop()."""

    def __init__(self, directory):
        names = sorted(name for name in os.listdir(directory)
                       if name.startswith("model") and name.endswith(".safetensors"))
        paths = [os.path.join(directory, name) for name in names]
        if not paths:
            die(f"{directory} holds no model*.safetensors")
        self.open = {}
        self.paths = {name: path for path in paths for name in self.file(path).keys()}

    def file(self, path):
        if path not in self.open:
            self.open[path] = safe_open(path, "pt")
        return self.open[path]

    def drop(self):
        self.open.clear()

    def get(self, name):
        if name not in self.paths:
            die(f"tensor {name} is in none of the files")
        return self.file(self.paths[name]).get_tensor(name)

    def stacked(self, names, dtype):
        """One tensor of all these names' tensors, in dtype, without a second copy of them all."""
        out = torch.empty(len(names), *self.get(names[0]).shape, dtype=dtype)
        for row, name in zip(out, names):
            row.copy_(self.get(name))
        return out


def layerwise(config, weights, dtype, attention):
    """transformers' model whose modules fetch their weights when they are called, and drop them when they return."""
    with torch.device("meta"):
        model = OlmoeForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention,
                                              experts_implementation="eager")
    model.eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)     # has buffers, but no weights

    def fetch(module, path):
        state = {}
        for name, parameter in module.named_parameters():
            full = f"{path}.{name}"
            if full.endswith("experts.gate_up_proj"):
                experts = [full.replace("gate_up_proj", f"{e}.{which}_proj.weight")
                           for e in range(config.num_experts) for which in ("gate", "up")]
                state[name] = weights.stacked(experts, dtype).view(parameter.shape)
            elif full.endswith("experts.down_proj"):
                experts = [full.replace("down_proj", f"{e}.down_proj.weight") for e in range(config.num_experts)]
                state[name] = weights.stacked(experts, dtype)
            else:
                state[name] = weights.get(full).to(dtype, copy=True)
        module.load_state_dict(state, assign=True)
        weights.drop()

    modules = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    modules.update({f"model.layers.{l}": layer for l, layer in enumerate(model.model.layers)})
    for path, module in modules.items():
        module.register_forward_pre_hook(lambda module, args, path=path: fetch(module, path))
        module.register_forward_hook(lambda module, args, output: module.to("meta") and None)
    return model


def run(config, weights, dtype, attention, inputs):
    """logits, the router's logits by layer, the experts by layer."""
    start = time.time()
    with torch.no_grad():
        result = forward(layerwise(config, weights, dtype, attention), inputs)
    print(f"PyTorch {str(dtype).removeprefix('torch.')} {attention}: {time.time() - start:.0f} s", flush=True)
    return result


def errors(ours, reference):
    def relative(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()
    def share(a, b):
        return (a.sort(dim=-1).values != b.sort(dim=-1).values).any(dim=-1).double().mean().item()
    other = list(map(share, ours[2], reference[2]))
    return {"logits": relative(ours[0], reference[0]), "router": max(map(relative, ours[1], reference[1])),
            "experts": sum(other) / len(other)}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", required=True)
    parser.add_argument("--out", metavar="FILE", required=True)
    parser.add_argument("--batch", type=int, default=2, help="sequences; default %(default)s")
    parser.add_argument("--seq", type=int, default=64, help="tokens of each; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the random tokens")
    o = parser.parse_args(words)
    if not os.path.isfile(os.path.join(o.model, "config.json")):
        die(f"{o.model} has no config.json; --model takes a Hugging Face directory")
    quiet()
    config = OlmoeConfig.from_pretrained(o.model, local_files_only=True)
    weights = Weights(o.model)
    inputs = torch.randint(config.vocab_size, (o.batch, o.seq), generator=torch.Generator().manual_seed(o.seed))
    logits, routers, choices = reference = run(config, weights, torch.float32, "eager", inputs)
    metadata = {"made_with": f"torch {torch.__version__} transformers {transformers.__version__}"}
    for attention in ("eager", "sdpa"):
        for what, error in errors(run(config, weights, torch.bfloat16, attention, inputs), reference).items():
            metadata[f"bf16_{attention}_{what}"] = f"{error:.3e}"
    tensors = {"inputs": inputs.int(), "logits": logits}
    for l, (router, choice) in enumerate(zip(routers, choices)):
        tensors[f"router.{l}.logits"] = router
        tensors[f"router.{l}.experts"] = choice.int()
    write_safetensors(o.out, tensors, metadata)
    for key, value in metadata.items():
        print(f"{key} {value}")
    print(f"{o.out}: {os.path.getsize(o.out)} bytes", flush=True)


if __name__ == "__main__":
    main()
