"""`mm train dpo` against MiniMind's train_dpo.py and TRL's DPOTrainer: speed, exactness, memory. On CPU.

    python tests/bench/dpo.py --jsonl dpo.jsonl --tokenizer DIR [--minimind CHECKOUT] [--trl] [--pairs 24]
                              [--short] [--hidden 512] [--layers 8] [--repeat 1]
                              [--threads 2] [--cpu-time] [--only speed,exact,share,memory]

All train one model (Qwen3's shape, which MiniMind's is too) from the same weights on the same pairs: --pairs of those that fit
1,024 tokens a side, evenly spread over the file. MiniMind runs its own train_epoch, its batches made beforehand; TRL its own
DPOTrainer with precompute_ref_log_probs, rows sorted by length so that little is padded, no checkpointing. TRL's packages may stand in a directory of
their own on PYTHONPATH. Two epochs cost a reference of each pair twice (MiniMind) or once (TRL, mm).
FLOPs are counted from the shapes: 2 a weight and token, causal attention half of the square, backward twice the forward.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mmdata.pairs import PairLoader
from mmdata.pipeline import pack
from mmdata.shards import Dataset, open_dataset, open_sources
from mmtrain import reference
from mmtrain.batch import Batch, counts_of, logps_of, to_device
from mmtrain.config import PRESETS, ModelConfig
from mmtrain.distributed import World
from mmtrain.model import Model
from mmtrain.optim import adamw, flat_gradient, update
from mmtrain.preference import Objective, pair_figures

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MAX_LEN = 1024
CLOCK = time.perf_counter


# --- the pairs ------------------------------------------------------------------------------------------------------


def subset(options: argparse.Namespace, root: Path) -> tuple[Dataset, Path]:
    """A packed dataset of --pairs rows that fit, and the jsonl of just these."""
    lines = options.jsonl.read_bytes().splitlines()
    whole = pack([options.jsonl], root / "whole", tokenizer_dir=options.tokenizer, max_len=MAX_LEN, val_fraction=0)
    kept = np.concatenate([open_sources(open_dataset(whole.out), 0)["line"]])
    chosen = kept[np.linspace(0, len(kept) - 1, min(options.pairs, len(kept))).astype(int)]
    sizes = np.array([len(line) for line in lines])[kept - 1]
    if options.short:  # by bytes of their rows
        chosen = kept[np.argsort(sizes, kind="stable")[: options.pairs]]
    path = root / "pairs.jsonl"
    path.write_bytes(b"".join(lines[line - 1] + b"\n" for line in chosen))
    packed = pack([path], root / "pairs", tokenizer_dir=options.tokenizer, max_len=MAX_LEN, val_fraction=0)
    return open_dataset(packed.out), path


def shape_of(options: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """MiniMind HEAD's shape at this width: 8 heads, 4 of keys and values, its feed-forward size, normalised heads."""
    ffn = -(-int(options.hidden * np.pi + 0.9999) // 64) * 64
    return ModelConfig(vocab_size, options.hidden, options.layers, 8, 4, ffn, norm_eps=1e-6, qk_norm=True)


# --- counting -------------------------------------------------------------------------------------------------------


def forward_flops(shape: ModelConfig, tokens: int, scored: int, squares: float) -> float:
    """Of one forward pass: tokens through the blocks, `scored` of them through the head, `squares` query-key pairs."""
    per_layer = shape.hidden_size * (2 * shape.hidden_size + 2 * shape.num_kv_heads * shape.head_size)
    per_layer += 3 * shape.hidden_size * shape.ffn_size
    head = shape.vocab_size * shape.hidden_size
    return (
        2 * tokens * shape.num_layers * per_layer
        + 2 * scored * head
        + 4 * squares * shape.num_layers * shape.hidden_size
    )


def our_flops(shape: ModelConfig, loader: PairLoader, scored: int) -> float:
    """One forward pass over every pair."""
    prompt, chosen, rejected = loader.lengths.T.astype(float)
    squares = ((prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2).sum()
    squares += 0 if loader.share_prompt else (prompt**2 / 2).sum()
    tokens = loader.lengths.sum() if loader.share_prompt else loader.tokens_per_epoch
    return forward_flops(shape, int(tokens), scored, squares)


# --- the three trainers -----------------------------------------------------------------------------------------------


def ours(model: Model, dataset: Dataset, *, share_prompt: bool) -> tuple[float, float, PairLoader]:
    """Seconds of the reference pass and of an epoch, as `mm train dpo` runs them."""
    loader = PairLoader([dataset], batch_tokens=4096, micro_tokens=4096, seed=0, share_prompt=share_prompt)
    begun = CLOCK()
    ref = reference.compute(model, loader, ALONE)
    ref_s = CLOCK() - begun
    gradient, optimizer, objective = flat_gradient(model), adamw(model, lr=4e-8, weight_decay=0.01), Objective()
    begun = CLOCK()
    for step in range(loader.steps_per_epoch):
        gradient.zero_()
        count = 0
        for micro in loader.batch(step):
            batch = to_device(micro, CPU)
            loss, _ = pair_figures(
                objective, logps_of(model, batch).view(-1, 2), counts_of(batch).view(-1, 2), ref[batch.samples]
            )
            loss.sum().backward()
            count += len(loss)
        update(optimizer, gradient, lr=4e-8, count=count, clip=1.0)
    return ref_s, CLOCK() - begun, loader


def minimind(options: argparse.Namespace, shape: ModelConfig, weights: dict[str, torch.Tensor], path: Path) -> float:
    """Seconds of an epoch of its own loop, batch 4, float32."""
    sys.path.insert(0, str(options.minimind))
    import trainer.train_dpo as theirs  # type: ignore[import-not-found]
    from dataset.lm_dataset import DPODataset  # type: ignore[import-not-found]
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    config = MiniMindConfig(hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers)
    models = [MiniMindForCausalLM(config) for _ in range(2)]
    for each in models:
        each.load_state_dict(weights, strict=False)
    policy, ref = models
    ref.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(str(options.minimind / "model"))
    rows = DPODataset(str(path), tokenizer, max_length=MAX_LEN)
    batches = list(torch.utils.data.DataLoader(rows, batch_size=4))
    theirs.args = SimpleNamespace(
        device="cpu",
        epochs=1,
        learning_rate=4e-8,
        accumulation_steps=1,
        grad_clip=1.0,
        log_interval=10**9,
        save_interval=10**9,
    )
    theirs.autocast_ctx, theirs.model = nullcontext(), policy
    theirs.optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-8)
    theirs.scaler = torch.amp.GradScaler("cpu", enabled=False)
    begun = CLOCK()
    theirs.train_epoch(0, batches, len(batches) + 1, ref, config, 0, None, 0.15)
    return CLOCK() - begun


def hf_model(shape: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    """The same model as transformers has it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def trl_trainer(
    options: argparse.Namespace, model: Any, dataset: Dataset, root: Path, batch: int
) -> tuple[Any, list[float]]:
    """TRL's trainer on the tokens mm trains on, and the seconds its reference pass takes, in a list."""
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    split = dataset.split("train")
    rows = []
    for number in range(split.num_samples()):
        pair = split.sample(*split.locate(number))
        assert pair.chosen_span.tolist() == [0, len(pair.chosen)], "TRL trains whole replies only"
        rows.append({f"{name}_ids": getattr(pair, name).tolist() for name in ("prompt", "chosen", "rejected")})
    rows.sort(key=lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"]))
    config = DPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=batch,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=batch,
        num_train_epochs=1,
        max_length=MAX_LEN,
        learning_rate=4e-8,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
    )
    spent: list[float] = []
    plain, prepare = DPOTrainer._precompute_ref_logps, DPOTrainer._prepare_dataset

    def timed(self: Any, *args: Any) -> Any:
        begun = CLOCK()
        found = plain(self, *args)
        spent.append(CLOCK() - begun)
        return found

    DPOTrainer._precompute_ref_logps = timed
    DPOTrainer._prepare_dataset = lambda self, dataset, *args: dataset  # the rows are ids already
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(dataset.tokenizer_dir / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    try:
        trainer = DPOTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
    finally:
        DPOTrainer._precompute_ref_logps, DPOTrainer._prepare_dataset = plain, prepare
    return trainer, spent


# --- the tables -------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, dataset: Dataset, path: Path, root: Path) -> None:
    """Pairs a second over two epochs."""
    torch.manual_seed(0)
    shape = shape_of(options, 6400)
    model = Model(shape)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    num_pairs = dataset.split("train").num_samples()
    scored = dataset.split("train").totals.loss_tokens
    print(f"{shape.num_params:,} parameters, {num_pairs} pairs, {dataset.split('train').totals.model_tokens:,} tokens")
    rows: list[tuple[str, float, float]] = []
    for share in (False, True):
        runs = [ours(model, dataset, share_prompt=share) for _ in range(options.repeat)]
        ref_s, epoch_s, loader = min(runs, key=lambda run: run[0] + 2 * run[1])
        flops = 7 * our_flops(shape, loader, scored)  # twice forward and backward, once the reference
        rows.append((f"mm, prompt {'once' if share else 'twice'}", ref_s + 2 * epoch_s, flops))
        print(f"measured: {rows[-1][0]}, {rows[-1][1]:.1f} s", flush=True)
        model.load_state_dict(weights)
    if options.minimind:
        epoch_s = min(minimind(options, shape, weights, path) for _ in range(options.repeat))
        positions = 2 * (MAX_LEN - 1)
        squares = 2 * (MAX_LEN - 1) ** 2 / 2
        flops = 8 * num_pairs * forward_flops(shape, positions, positions, squares)
        rows.append(("MiniMind train_dpo.py, batch 4", 2 * epoch_s, flops))
        print(f"measured: {rows[-1][0]}, {rows[-1][1]:.1f} s", flush=True)
    if options.trl:
        for batch in (4, 8):
            trainer, spent = trl_trainer(options, hf_model(shape, weights), dataset, root, batch)
            begun = CLOCK()
            trainer.train()
            rows.append((f"TRL DPOTrainer, batch {batch}", spent[0] + 2 * (CLOCK() - begun), float("nan")))
            print(f"measured: {rows[-1][0]}, {rows[-1][1]:.1f} s", flush=True)
    _, mine_s, mine_flops = rows[1]
    print(f"{'two epochs':<34} {'pairs/s':>8} {'mm is':>7} {'TFLOP counted':>14} {'FLOPs allow':>12} {'reached':>8}")
    for name, seconds, flops in rows:
        allowed, gain = flops / mine_flops, seconds / mine_s
        print(
            f"{name:<34} {2 * num_pairs / seconds:>8.3f} {gain:>6.2f}x {flops / 1e12:>14.2f} {allowed:>11.2f}x "
            f"{100 * gain / allowed:>7.0f}%"
        )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference of two vectors."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def our_gradient(model: Model, batches: Iterable[Batch], ref: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean loss, logps by pair and gradient of pairs, added up over micro-batches."""
    model.zero_grad()
    losses, found = [], torch.zeros_like(ref)
    for batch in batches:
        logps = logps_of(model, batch).view(-1, 2)
        loss, _ = pair_figures(Objective(), logps, counts_of(batch).view(-1, 2), ref[batch.samples])
        (loss.sum() / len(ref)).backward()
        losses += loss.tolist()
        found[batch.samples] = logps.detach()
    return sum(losses) / len(losses), found, gradient_of(model)


def exact(options: argparse.Namespace, dataset: Dataset, root: Path) -> None:
    """Loss, log-probabilities and gradients: against TRL, prompts shared against separate, packed against one at a time."""
    torch.manual_seed(0)
    shape = shape_of(options, 6400)
    model = Model(shape)
    loaders = {
        name: PairLoader([dataset], batch_tokens=10**9, micro_tokens=n, seed=0, share_prompt=share)
        for name, n, share in (("shared", 8192, True), ("separate", 8192, False), ("one", 1, False))
    }
    ref = reference.compute(model, loaders["one"], ALONE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # a policy that has moved: margins that are not 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.abs().mean())
    found = {}
    for name, loader in loaders.items():
        found[name] = our_gradient(model, (to_device(micro, CPU) for micro in loader.batch(0)), ref)
    print(f"{'against':<40} {'loss':>9} {'logps':>9} {'gradient':>9}   relative difference, float32")
    for name, a, b in (
        ("prompt once / twice", "shared", "separate"),
        ("packed / one pair at a time", "separate", "one"),
    ):
        (loss, logps, grad), (loss2, logps2, grad2) = found[a], found[b]
        print(f"{name:<40} {abs(loss - loss2) / loss2:>9.1e} {gap(logps, logps2):>9.1e} {gap(grad, grad2):>9.1e}")
    if options.trl:
        theirs = hf_model(shape, weights)
        trainer, _ = trl_trainer(options, theirs, dataset, root, 4)  # its reference is computed with these weights
        theirs.load_state_dict(model.state_dict(), strict=False)
        trainer.model.train()
        trainer.model.zero_grad()
        total, count = 0.0, 0
        columns = trainer.train_dataset
        for begin in range(0, len(columns), 4):
            batch = trainer.data_collator([columns[i] for i in range(begin, min(begin + 4, len(columns)))])
            loss = trainer.compute_loss(trainer.model, batch)
            size = len(batch["input_ids"]) // 2
            (loss * size / len(columns)).backward()
            total, count = total + float(loss) * size, count + size
        loss, _, grad = found["shared"]
        lengths = loaders["one"].lengths  # TRL's rows stand by length
        ref = ref[np.argsort(lengths[:, 0] + lengths[:, 1:].max(1), kind="stable")]
        their_ref = torch.tensor([list(columns["ref_chosen_logps"]), list(columns["ref_rejected_logps"])]).T
        print(
            f"{'mm / TRL sigmoid':<40} {abs(loss - total / count) / loss:>9.1e} {gap(ref, their_ref):>9.1e} "
            f"{gap(grad, gradient_of(theirs)):>9.1e}   (loss {loss:.6f}; logps are the reference's)"
        )


def share(options: argparse.Namespace) -> None:
    """What computing a prompt once saves, by its share of the tokens: random pairs of 600 tokens a side."""
    torch.manual_seed(0)
    shape = shape_of(options, 6400)
    model = Model(shape)
    draw = np.random.default_rng(0)
    print(
        f"{'prompt, replies':>16} {'tokens saved':>13} {'once':>8} {'twice':>8} {'gain':>6}   seconds, forward and backward"
    )
    for prompt in (10, 40, 80, 150, 300, 450):
        reply = 600 - prompt
        times = []
        for is_shared in (True, False):
            batch = random_batch(draw, prompt, reply, is_shared)
            best = []
            for _ in range(1 + options.repeat):
                begun = CLOCK()
                model.zero_grad()
                logps_of(model, batch).sum().backward()
                best.append(CLOCK() - begun)
            times.append(min(best[1:]))
        once, twice = times
        saved = prompt / (2 * prompt + 2 * reply)
        print(f"{prompt:>8} {reply:>7} {100 * saved:>12.1f}% {once:>8.2f} {twice:>8.2f} {twice / once:>5.2f}x")


def random_batch(draw: np.random.Generator, prompt: int, reply: int, is_shared: bool) -> Batch:
    """Two pairs of random tokens, trained on their replies."""
    from mmdata.loader import assemble

    lengths = np.array([[prompt, reply, reply]] * 2)
    sizes = np.array([prompt + 2 * reply] * 2 if is_shared else [prompt + reply] * 4)
    pieces, spans, at = [], [], 0
    for _ in range(2):
        for side in range(2):
            if not (is_shared and side):
                pieces.append(draw.integers(0, 6400, prompt))
                at += prompt
            pieces.append(draw.integers(0, 6400, reply))
            spans += [at, at + reply]
            at += reply
    shared = lengths if is_shared else None
    return to_device(assemble(pieces, sizes, np.array(spans), np.arange(2), np.empty, shared), CPU)


def memory(options: argparse.Namespace) -> None:
    """Peak of the 104M model at 8 pairs of 2 x 1,024 tokens on CUDA, computed from bytes a token counted here under bf16."""
    shape = PRESETS["minimind2"]
    tokens = 8 * 2 * 1024
    states = 16 * shape.num_params  # weights, gradient and two moments in fp32
    copies = 2 * shape.num_params  # the matrices in bf16
    head = 2 * 2048 * shape.vocab_size * 4  # one chunk of logits and of their gradient
    print(f"{'104M, 8 x 2 x 1024, GB (computed)':<36} {'KB a token and layer':>20} {'activations':>12} {'in all':>7}")
    for name, per_token in (
        ("eager", saved_bytes(lambda block: block)),
        (
            "compiled",
            saved_bytes(lambda block: torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)),
        ),
        (
            "blocks computed again",
            4 * shape.hidden_size,
        ),  # the stream between blocks alone, fp32, and one block at a time
    ):
        activations = tokens * per_token * shape.num_layers
        if name == "blocks computed again":
            activations += tokens * saved_bytes(lambda block: block)
        total = (states + copies + head + activations) / 1e9
        print(f"{name:<36} {per_token / 1e3:>20.1f} {activations / 1e9:>12.2f} {total:>7.2f}")


def saved_bytes(wrap: Callable[[torch.nn.Module], Any]) -> float:
    """Bytes a token that one block of the 104M model keeps for its backward pass, under bf16 autocast: the slope between 128
    and 256 tokens, so that what depends on the weights alone is left out."""
    from dataclasses import replace

    from mmtrain.model import make_layout, rotary_table

    shape = replace(PRESETS["minimind2"], num_layers=1)
    torch.manual_seed(0)
    block = Model(shape).model.layers[0]
    sizes = []
    for tokens in (128, 256):
        torch._dynamo.reset()
        run = wrap(block)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        layout = make_layout(torch.tensor([0, tokens], dtype=torch.int32), tokens, CPU)
        cos, sin = rotary_table(torch.arange(tokens), shape.head_size, shape.rope_theta)
        x = torch.randn(tokens, shape.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            out = run(x, cos, sin, layout)
        own = {p.untyped_storage().data_ptr() for p in block.parameters()} | {
            t.untyped_storage().data_ptr() for t in (cos, sin)
        }
        sizes.append(sum(size for at, size in kept.items() if at not in own))
        del out
    return (sizes[1] - sizes[0]) / 128


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--minimind", type=Path, help="checkout of its repository")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument(
        "--short", action="store_true", help="the shortest pairs instead: sums that float32 holds to 1e-6"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, for --threads 1 on a machine in use")
    parser.add_argument("--only", default="speed,exact,share,memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    wanted = options.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(root / "cache")
        if {"speed", "exact"} & set(wanted):
            dataset, path = subset(options, root)
            if "speed" in wanted:
                speed(options, dataset, path, root)
            if "exact" in wanted:
                exact(options, dataset, root)
        if "share" in wanted:
            share(options)
        if "memory" in wanted:
            memory(options)


if __name__ == "__main__":
    main()
