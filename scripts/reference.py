#!/usr/bin/env python3
"""Makes OLMoE models with random weights and what PyTorch and transformers compute from them.

Writes a Hugging Face directory (config.json, model.safetensors with the hub's per-expert names) and in it
reference.safetensors, the file that `olmoe verify --reference` reads: logits, the separate losses, every
gradient, the routing, and the losses of a few AdamW steps with clipping.

  reference.py --out DIR --shape odd --seed 2     one model
  reference.py --out DIR --model DIR2             the reference of an existing model; its weights are not copied
  reference.py --out DIR --lengths 5,1,40         sequences of these lengths, in place of --batch of --seq
  reference.py --all tests/fixtures               the committed fixtures again

The numbers come from transformers' own modules, run in float64, also where transformers asks for float32
(norms, softmax, rotary tables). The same modules as they are, in float32, are compared with that, and the run
fails if they disagree: the errors are in the file's metadata (fp32_*), as are those of PyTorch's bf16 runs where
the weights are bf16 (bf16_eager_*, bf16_sdpa_*): relative L2 of the logits and of all gradients as one vector,
of the worst gradient tensor (*_worst_grad), and the worst relative error of a loss.

Losses: with N = B*T tokens, probabilities p = softmax(z), c_i the tokens that chose expert i:
  ce = -sum over valid targets of log softmax(logits)[target] / (number of valid targets, or N)
       with --weights: times a weight of each target's own
  lb = lb_coef * E/(L*N*K) * sum over layers and experts of c_i * mean over tokens of p_i
  z  = z_coef / (L*N*K) * sum over layers and tokens of logsumexp(z)^2

Sequences of several lengths are one micro-batch of N tokens in all. Each goes alone through transformers' model,
without padding, its positions from 0; the file's inputs are [1, N], and its tensor `lengths` says where they part.
"""
import argparse
import itertools
import json
import os
import struct
import shutil
import sys


def die(message):
    print(f"reference.py: {message}", file=sys.stderr)
    sys.exit(1)


try:
    import torch
    import torch.nn.functional as F
    import transformers
    from safetensors import safe_open
    from transformers import OlmoeConfig, OlmoeForCausalLM
except ImportError as error:
    die(f"{error}; install what scripts/requirements.txt lists, in a virtual environment: "
        "pip install -r scripts/requirements.txt")

# The committed fixtures. Whatever a shape does not name is as in DEFAULTS.
DEFAULTS = dict(
    layers=2, hidden=32, heads=2, vocab=128, experts=8, topk=2, width=32, batch=2, seq=32,
    rope_theta=10000.0, rms_norm_eps=1e-5, norm_topk_prob=False, bf16=False, ignore=0.0, margin=0.01,
    lb_coef=0.01, z_coef=0.001, lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0,
    ce_divisor="valid", steps=10, seed=1, lengths="", weights=False)
SHAPES = {
    "regular": dict(),
    # Nothing is a power of two or a multiple of 8, and every option differs from its default.
    "odd": dict(hidden=42, heads=3, vocab=211, experts=5, topk=2, width=19, batch=3, seq=33, ignore=0.2,
                rope_theta=500.0, rms_norm_eps=1e-3, lb_coef=0.5, z_coef=0.2, lr=1e-2, beta1=0.8, beta2=0.9,
                eps=1e-6, weight_decay=0.5, grad_clip=0.5, ce_divisor="all", seed=2),
    # No routing to decide; longer than a few hundred rows, so that attention works in more than one block.
    "all_experts": dict(hidden=24, heads=2, vocab=64, experts=3, topk=3, width=40, batch=1, seq=300, z_coef=0.1,
                        seed=3),
    # The chosen experts' weights sum to one; fewer tokens than experts, and some experts get none.
    "normalized": dict(layers=1, hidden=40, heads=2, vocab=96, experts=10, topk=3, width=14, seq=3, norm_topk_prob=True,
                       grad_clip=0.0, seed=4),
    # bf16 logits are right to two or three digits: a margin that such errors don't cross. With a small eps every
    # weight would move by lr at once, and bf16 would round whole steps away.
    "bf16": dict(bf16=True, margin=0.3, lr=1e-2, eps=1e-2, seed=6),
}
RECIPE = ("lb_coef", "z_coef", "lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip", "ce_divisor")


class Float64(torch.overrides.TorchFunctionMode):
    """Every float32 that the code inside asks for becomes float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*[wide(a) for a in args], **{k: wide(v) for k, v in (kwargs or {}).items()})


def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def twin(model, dtype, attention="eager"):
    """A model with the same weights in another precision."""
    copy = OlmoeForCausalLM._from_config(model.config, dtype=dtype, attn_implementation=attention,
                                         experts_implementation="eager")
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    return copy


def draw_model(o, generator):
    """Weights that keep activations near one and no tensor's gradient tiny; the router's logits spread by 2."""
    config = OlmoeConfig(
        vocab_size=o.vocab, hidden_size=o.hidden, intermediate_size=o.width, num_hidden_layers=o.layers,
        num_attention_heads=o.heads, num_key_value_heads=o.heads, num_experts=o.experts, num_experts_per_tok=o.topk,
        max_position_embeddings=max(o.seq, 64), rms_norm_eps=o.rms_norm_eps, norm_topk_prob=o.norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": o.rope_theta},
        pad_token_id=None, eos_token_id=0, bos_token_id=None)
    model = OlmoeForCausalLM._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            random = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * random)
            elif "embed" in name:
                weight.copy_(random)
            else:  # (..., out, in)
                weight.copy_(random * (2.0 if "mlp.gate." in name else 1.0) / weight.shape[-1] ** 0.5)
            if o.bf16:
                weight.copy_(weight.to(torch.bfloat16))
    return model


def forward(model, inputs, lengths=None):
    """logits (B, T, V), per layer the router's logits (B, T, E) and choice (B, T, K), by probability. With lengths,
    inputs are (1, N): sequences of these lengths, and each goes through the model alone."""
    if lengths:
        logits, routers, choices = zip(*(forward(model, sequence) for sequence in inputs.split(lengths, dim=1)))
        return (torch.cat(logits, dim=1), [torch.cat(layer, dim=1) for layer in zip(*routers)],
                [torch.cat(layer, dim=1) for layer in zip(*choices)])
    routing = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda module, args, output: routing.append(output))
             for layer in model.model.layers]
    logits = model(input_ids=inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, [r[0].view(*inputs.shape, -1) for r in routing], [r[2].view(*inputs.shape, -1) for r in routing]


def margins(routers, K):
    """(B, T): the smallest gap over the layers between the logits of a rank, up to the K-th, and the next."""
    gaps = []
    for z in routers:
        z = F.pad(z.detach().double().sort(dim=-1, descending=True).values, (0, 1), value=-torch.inf)
        gaps.append((z[..., :K] - z[..., 1:K + 1]).amin(dim=-1))
    return torch.stack(gaps).amin(dim=0)


def draw_inputs(exact, o, generator):
    """Random tokens whose routing is decisive. Attention is causal: in each sequence, the first token whose margin is
    too small is drawn again until it has one, and what is before it stays good."""
    V = exact.config.vocab_size
    lengths = o.lengths or [o.seq] * o.batch
    starts = [0, *itertools.accumulate(lengths[:-1])]
    inputs = torch.randint(V, (1, sum(lengths)) if o.lengths else (o.batch, o.seq), generator=generator)
    for attempt in range(50 * o.seq):
        with torch.no_grad(), Float64():
            routers = forward(exact, inputs, o.lengths)[1]
        small = (margins(routers, exact.config.num_experts_per_tok) < o.margin).flatten().split(lengths)
        again = [start + int(s.int().argmax()) for start, s in zip(starts, small) if s.any()]
        if not again:
            return inputs
        inputs.view(-1)[again] = torch.randint(V, (len(again),), generator=generator)
    die(f"no tokens found whose routing margin is at least {o.margin}; give a smaller --margin or another --seed")


def draw_target_weights(shape, o, generator):
    """What each target counts, or None: all different, a few of them negative."""
    if not o.weights:
        return None
    weights = (0.1 + 1.8 * torch.rand(shape, generator=generator)) / shape.numel()
    return torch.where(torch.rand(shape, generator=generator) < 0.15, -weights, weights)


def auxiliary(routers, choices, lb_coef, z_coef):
    """Load-balancing loss and router z-loss of one micro-batch, from the layers' (B, T, E) logits and choices."""
    wide = torch.float64 if routers[0].dtype == torch.float64 else torch.float32
    lb = z = torch.zeros((), dtype=wide)
    L, E, K = len(routers), routers[0].shape[-1], choices[0].shape[-1]
    for router, choice in zip(routers, choices):
        router = router.to(wide).flatten(0, 1)
        N = len(router)
        counts = torch.bincount(choice.flatten(), minlength=E).to(wide)
        lb = lb + lb_coef * E / (L * N * K) * (counts * router.softmax(dim=-1).mean(dim=0)).sum()
        z = z + z_coef / (L * N * K) * router.logsumexp(dim=-1).square().sum()
    return lb, z


def losses(model, inputs, targets, target_weights, o):
    """loss, ce, lb, z; logits, router logits, choices."""
    logits, routers, choices = forward(model, inputs, o.lengths)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if target_weights is None:
        divisor = inputs.numel() if o.ce_divisor == "all" else int((targets >= 0).sum())
        ce = F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        ce = ce / divisor
    else:
        ce = F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        ce = (target_weights.to(wide).flatten() * ce).sum()
    lb, z = auxiliary(routers, choices, o.lb_coef, o.z_coef)
    return ce + lb + z, ce, lb, z, logits, routers, choices


def per_expert(tensors):
    """transformers holds a layer's experts in two tensors; the hub's files, and ours, name each expert's matrices."""
    for name, tensor in tensors:
        if name.endswith("experts.gate_up_proj"):
            for e, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                yield name.replace("gate_up_proj", f"{e}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{e}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(tensor):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), matrix
        else:
            yield name, tensor


def run(model, inputs, targets, target_weights, o):
    """Everything that the reference holds, in the model's own precision. Changes the model's weights."""
    result, curve = {}, []
    weights = dict(model.named_parameters())
    # The optimizer's copy of the weights: fp32 where the model is bf16.
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    master = {name: weight.detach().to(wide, copy=True).requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(master.values(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps,
                                  weight_decay=o.weight_decay, foreach=False)
    smallest = torch.inf
    for step in range(max(o.steps, 1)):
        model.zero_grad(set_to_none=False)
        loss, ce, lb, z, logits, routers, choices = losses(model, inputs, targets, target_weights, o)
        loss.backward()
        curve.append(loss.detach().double())
        smallest = min(smallest, margins(routers, choices[0].shape[-1]).min().item())
        for name, weight in weights.items():
            master[name].grad = torch.zeros_like(master[name]) if weight.grad is None else weight.grad.to(wide)
        if step == 0:
            result.update(
                logits=logits.detach().double(), loss=loss.detach().double(), ce_loss=ce.detach().double(),
                lb_loss=lb.detach().double(), z_loss=z.detach().double(),
                router_logits=[r.detach().double() for r in routers], choices=choices,
                grads={n: g.clone().double() for n, g in per_expert((n, m.grad) for n, m in master.items())})
            result["grad_norm"] = torch.cat([g.flatten() for g in result["grads"].values()]).norm().item()
        if o.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(master.values(), o.grad_clip, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(master[name])
    result["losses"] = torch.stack(curve)[:o.steps]
    result["margin_while_training"] = smallest
    return result


def errors(ours, reference):
    """Relative L2 of logits and of all gradients as one vector; the worst relative error of a loss."""
    def relative(a, b):
        return ((a - b).norm() / b.norm()).item()
    names = list(reference["grads"])
    worst = max(abs(ours[n] - reference[n]).item() / abs(reference[n]).item() for n in ("loss", "ce_loss"))
    if len(reference["losses"]):
        worst = max(worst, ((ours["losses"] - reference["losses"]).abs() / reference["losses"].abs()).max().item())
    worst_grad = max(relative(ours["grads"][n], g) for n, g in reference["grads"].items() if g.norm() > 0)
    return {"logits": relative(ours["logits"], reference["logits"]), "worst_grad": worst_grad,
            "grads": relative(*[torch.cat([r["grads"][n].flatten() for n in names]) for r in (ours, reference)]),
            "losses": worst}


def same_routing(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["choices"], b["choices"]))


def write_safetensors(path, tensors, metadata):
    """The library's own writer orders the metadata at random; fixtures should not change when they are made again."""
    dtypes = {torch.float32: "F32", torch.int32: "I32"}
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())


def write_model(directory, model, dtype):
    """config.json and model.safetensors as save_pretrained writes them; checks that the file holds the hub's names."""
    twin(model, dtype).save_pretrained(directory)
    weights = dict(per_expert(model.state_dict().items()))
    with safe_open(f"{directory}/model.safetensors", "pt") as file:
        right = set(file.keys()) == weights.keys() and all(
            file.get_tensor(name).dtype == dtype and torch.equal(file.get_tensor(name).float(), weight)
            for name, weight in weights.items())
    if not right:
        die("save_pretrained did not write the weights under the hub's per-expert names; "
            "use the versions in scripts/requirements.txt")


def reference(out, o, name):
    """Writes one directory, complete or not at all."""
    generator = torch.Generator().manual_seed(o.seed)
    if o.model:
        if not os.path.isfile(os.path.join(o.model, "config.json")):
            die(f"{o.model} has no config.json; "
                "--model takes a Hugging Face directory with config.json and model.safetensors")
        try:
            model = OlmoeForCausalLM.from_pretrained(o.model, dtype=torch.float32, local_files_only=True)
            model.config.pad_token_id = None  # a padding index would zero its token's gradient
            o.bf16 = OlmoeConfig.from_pretrained(o.model).dtype == torch.bfloat16
        except (OSError, ValueError) as error:
            die(f"{o.model}: {str(error).splitlines()[0]}; transformers has to be able to open it")
    else:
        model = draw_model(o, generator)
    c = model.config
    if o.seq > c.max_position_embeddings:
        die(f"--seq {o.seq} is longer than the model's {c.max_position_embeddings} positions; give a smaller one")
    with Float64():
        exact = twin(model, torch.float64)
    inputs = draw_inputs(exact, o, generator)
    targets = torch.randint(c.vocab_size, inputs.shape, generator=generator)
    if o.lengths:
        for to, sequence in zip(targets.split(o.lengths, dim=1), inputs.split(o.lengths, dim=1)):
            to[:, :-1] = sequence[:, 1:]
    else:
        targets[:, :-1] = inputs[:, 1:]
    ignored = torch.rand(targets.shape, generator=generator) < o.ignore
    ignored[0, 0] &= not ignored.all()  # one at least is left
    targets[ignored] = -100
    target_weights = draw_target_weights(inputs.shape, o, generator)
    batch = inputs, targets, target_weights, o

    with Float64():
        truth = run(exact, *batch)
    peers = {"fp32": run(twin(model, torch.float32), *batch)}
    if o.bf16:
        for attention in ("eager", "sdpa"):
            peers[f"bf16_{attention}"] = run(twin(model, torch.bfloat16, attention), *batch)
    metadata = {key: str(getattr(o, key)) for key in RECIPE if target_weights is None or key != "ce_divisor"}
    metadata["made_with"] = f"torch {torch.__version__} transformers {transformers.__version__}"
    for peer, result in peers.items():
        metadata.update({f"{peer}_{what}": f"{error:.3e}" for what, error in errors(result, truth).items()})
        if o.model and peer != "fp32":
            continue  # bf16's errors on given weights are as they are; weights drawn here must be fit for comparing
        if not same_routing(result, truth):
            die(f"{name}: PyTorch's {peer} run routes otherwise than float64; "
                "give a larger --margin or another --seed")
        for what in ("logits", "grads", "worst_grad", "losses") if peer == "fp32" else ("losses",):
            bar = 1e-5 if peer == "fp32" else 2**-9
            if not float(metadata[f"{peer}_{what}"]) <= bar:
                die(f"{name}: PyTorch's {peer} {what} differ from float64 by {metadata[f'{peer}_{what}']}, "
                    f"more than {bar:.1e}; give another --seed, a larger --margin, or another --lr and --eps")

    tensors = {"inputs": inputs.int(), "targets": targets.int(), "logits": truth["logits"].float()}
    if o.lengths:
        tensors["lengths"] = torch.tensor(o.lengths, dtype=torch.int32)
    if target_weights is not None:
        tensors["weights"] = target_weights
    for key in ("loss", "ce_loss", "lb_loss", "z_loss"):
        tensors[key] = truth[key].float().reshape(1)
    for l, (router, choice) in enumerate(zip(truth["router_logits"], truth["choices"])):
        tensors[f"router.{l}.logits"] = router.float()
        tensors[f"router.{l}.experts"] = choice.int()
    if len(truth["losses"]):
        tensors["losses"] = truth["losses"].float()
    for tensor, gradient in truth["grads"].items():
        tensors[f"grad.{tensor}"] = gradient.float()

    building = f"{out.rstrip('/')}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    try:
        os.makedirs(building)
        if not o.model:
            write_model(building, model, torch.bfloat16 if o.bf16 else torch.float32)
        write_safetensors(f"{building}/reference.safetensors", tensors, metadata)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(building, out)
    except OSError as error:
        die(f"{out}: {error.strerror or error}; nothing was written")
    finally:
        shutil.rmtree(building, ignore_errors=True)

    loads = [torch.bincount(choice.flatten(), minlength=c.num_experts) for choice in truth["choices"]]
    print(f"{name}: L {c.num_hidden_layers} C {c.hidden_size} H {c.num_attention_heads} V {c.vocab_size} "
          f"E {c.num_experts} K {c.num_experts_per_tok} F {c.intermediate_size} "
          f"{'lengths ' + ' '.join(map(str, o.lengths)) if o.lengths else f'B {o.batch} T {o.seq}'}, "
          f"{sum(t.numel() for t in truth['grads'].values())} parameters, seed {o.seed}")
    print(f"  loss {truth['loss']:.6f} = "
          f"ce {truth['ce_loss']:.6f} + lb {truth['lb_loss']:.6f} + z {truth['z_loss']:.6f}, "
          f"after {o.steps} steps {truth['losses'][-1] if o.steps else truth['loss']:.6f}; "
          f"gradient norm {truth['grad_norm']:.4f}")
    print(f"  smallest routing margin {margins(truth['router_logits'], c.num_experts_per_tok).min():.3f}, "
          f"while training {truth['margin_while_training']:.2g}; "
          f"tokens of an expert {min(int(n.min()) for n in loads)} to {max(int(n.max()) for n in loads)}")
    for peer in peers:
        print(f"  PyTorch {peer:10s} logits {metadata[f'{peer}_logits']}, gradients {metadata[f'{peer}_grads']} "
              f"(worst tensor {metadata[f'{peer}_worst_grad']}), losses {metadata[f'{peer}_losses']}")
    print(f"  {out}: {sum(os.path.getsize(os.path.join(out, f)) for f in os.listdir(out))} bytes", flush=True)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("what to write").add_mutually_exclusive_group()
    where.add_argument("--out", metavar="DIR", help="the directory to make; must not exist")
    where.add_argument("--all", metavar="DIR", help=f"make DIR/{{{','.join(SHAPES)}}}, replacing what is there")
    parser.add_argument("--shape", choices=SHAPES, default="regular",
                        help="the shape whose values the options below replace")
    parser.add_argument("--model", metavar="DIR",
                        help="take weights and config.json from there; only reference.safetensors is written")
    for key, default in DEFAULTS.items():
        option = "--" + key.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, type=type(default), metavar=type(default).__name__.upper())
    arguments = parser.parse_args(words)
    if not (arguments.out or arguments.all):
        parser.print_help()
        return

    quiet()
    torch.set_num_threads(1)  # the same bits on any number of cores
    torch.use_deterministic_algorithms(True)
    names = SHAPES if arguments.all else [arguments.shape]
    for name in names:
        given = {key: value for key, value in vars(arguments).items() if value is not None}
        o = argparse.Namespace(**{**DEFAULTS, "model": None, **SHAPES[name], **({} if arguments.all else given)})
        try:
            o.lengths = [int(length) for length in o.lengths.split(",") if o.lengths]
        except ValueError:
            die(f"--lengths {o.lengths}: give numbers with commas between them")
        if o.lengths:
            o.batch, o.seq = len(o.lengths), max(o.lengths)
        if o.hidden % o.heads or o.hidden // o.heads % 2:
            die(f"--hidden {o.hidden} does not split into {o.heads} heads of an even size; change --hidden or --heads")
        if not 1 <= o.topk <= o.experts:
            die(f"--topk {o.topk} is not between 1 and --experts {o.experts}")
        if min(o.layers, o.width, o.batch, o.seq, o.vocab, *o.lengths) < 1 or o.steps < 0:
            die("--layers, --width, --batch, --seq, --vocab and --lengths must be at least 1, --steps at least 0")
        if o.ce_divisor not in ("valid", "all"):
            die(f"--ce-divisor {o.ce_divisor}: choose valid or all")
        if arguments.out and os.path.exists(arguments.out):
            die(f"{arguments.out} exists; remove it or choose another --out")
        reference(os.path.join(arguments.all, name) if arguments.all else arguments.out, o, name)


if __name__ == "__main__":
    main()
