"""`mm train dpo` against MiniMind's train_dpo.py and TRL's DPOTrainer: speed, exactness, memory. On CPU.

    python tests/bench/dpo.py --jsonl dpo.jsonl --tokenizer DIR [--minimind CHECKOUT] [--trl] [--pairs 24]
                              [--short] [--hidden 512] [--layers 8] [--repeat 1] [--init RUN]
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
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.dataset import Dataset, open_dataset, open_sources
from mmdata.shards.pairs import PairLoader
from mmtrain.checkpoint import load_model
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.model.preference import Objective, pair_figures
from mmtrain.shapes import MODEL_SHAPES, ModelConfig
from mmtrain.train import preflight, reference
from mmtrain.train.optim import flat_gradient, make, update

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MAX_LEN = 1024
CLOCK = time.perf_counter


# --- the pairs ------------------------------------------------------------------------------------------------------


def subset(options: argparse.Namespace, root: Path) -> tuple[Dataset, Path]:
    """A packed dataset of --pairs rows that fit, and the jsonl of just these."""
    lines = options.jsonl.read_bytes().splitlines()
    whole = pack(
        [options.jsonl], root / "whole", PackOptions(tokenizer=options.tokenizer, max_len=MAX_LEN, val_fraction=0)
    )
    kept = np.concatenate([open_sources(open_dataset(whole.out), 0)["line"]])
    chosen = kept[np.linspace(0, len(kept) - 1, min(options.pairs, len(kept))).astype(int)]
    sizes = np.array([len(line) for line in lines])[kept - 1]
    if options.short:  # by bytes of their rows
        chosen = kept[np.argsort(sizes, kind="stable")[: options.pairs]]
    path = root / "pairs.jsonl"
    path.write_bytes(b"".join(lines[line - 1] + b"\n" for line in chosen))
    packed = pack([path], root / "pairs", PackOptions(tokenizer=options.tokenizer, max_len=MAX_LEN, val_fraction=0))
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
    gradient, optimizer, objective = flat_gradient(model), make(model, "adamw", lr=4e-8, weight_decay=0.01), Objective()
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


def exact_gradient(
    shape: ModelConfig, weights: dict[str, torch.Tensor], batches: Iterable[Batch], ref: torch.Tensor | None
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The same in float64 from end to end (but for the angles of positions, float32 in every trainer), all logits at once.
    Without ref the loss and gradient mean nothing."""
    model = Model(shape).double()
    model.load_state_dict(weights)
    losses, found = [], {}
    for batch in batches:
        hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        logits = hidden[batch.trained - 1] @ model.head_weight.T
        tokens = logits.log_softmax(-1).gather(1, batch.ids[batch.trained][:, None])[:, 0]
        logps = (
            torch.zeros(batch.num_sequences, dtype=torch.float64).index_add(0, batch.sequence_ids, tokens).view(-1, 2)
        )
        if ref is not None:
            loss, _ = pair_figures(Objective(), logps, counts_of(batch).view(-1, 2), ref[batch.samples])
            (loss.sum() / len(ref)).backward()
            losses += loss.tolist()
        found |= zip(batch.samples.tolist(), logps.detach(), strict=True)
    logps = torch.stack([found[i] for i in range(len(found))])
    return sum(losses) / max(1, len(losses)), logps, gradient_of(model) if ref is not None else logps


def exact(options: argparse.Namespace, dataset: Dataset, root: Path) -> None:
    """Loss, log-probabilities and gradients: against float64, TRL; prompts shared against separate, packed against one at
    a time. Of an untrained model, and of --init's."""
    torch.manual_seed(0)
    shape = shape_of(options, 6400)
    exactness(options, dataset, root, "untrained", shape, dict(Model(shape).state_dict()))
    if options.init:
        model = load_model(options.init)[0]
        exactness(options, dataset, root, options.init.name, model.config, dict(model.state_dict()))


def exactness(
    options: argparse.Namespace,
    dataset: Dataset,
    root: Path,
    name: str,
    shape: ModelConfig,
    weights: dict[str, torch.Tensor],
) -> None:
    """The table of one model: relative differences of loss, log-probabilities and gradient, float32."""
    model = Model(shape)
    model.load_state_dict(weights)
    loaders = {
        way: PairLoader([dataset], batch_tokens=10**9, micro_tokens=n, seed=0, share_prompt=share)
        for way, n, share in (("shared", 8192, True), ("separate", 8192, False), ("one", 1, False))
    }
    batches = {way: [to_device(micro, CPU) for micro in loader.batch(0)] for way, loader in loaders.items()}
    ref = reference.compute(model, loaders["one"], ALONE)
    with torch.no_grad():  # a policy that has moved: margins that are not 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.abs().mean())
    moved = {key: value.clone() for key, value in model.state_dict().items()}
    found = {way: our_gradient(model, batches[way], ref) for way in loaders}
    with torch.no_grad():
        true_ref = exact_gradient(shape, weights, batches["one"], None)[1]
    found["float64"] = exact_gradient(shape, moved, batches["one"], true_ref)
    refs = dict.fromkeys(loaders, ref) | {"float64": true_ref}
    rows = [("prompt once / twice", "shared", "separate"), ("packed / one pair at a time", "separate", "one")]
    rows.append(("mm / float64", "shared", "float64"))
    if options.trl:
        order = np.argsort(row_lengths(loaders["one"]), kind="stable")  # TRL's rows stand by length
        loss, logps, grad = their_gradient(options, dataset, root, shape, weights, moved)
        logps = torch.empty_like(logps).index_copy_(0, torch.from_numpy(order), logps)
        found["TRL"], refs["TRL"] = (loss, logps, grad), logps
        rows += [("TRL / float64", "TRL", "float64"), ("mm / TRL sigmoid", "shared", "TRL")]
    moves = true_ref.abs().mean()
    print(
        f"{name}: {shape.num_params:,} parameters, {len(ref)} pairs, {moves:.0f} nats a reply, loss {found['float64'][0]:.5f}"
    )
    print(f"{'relative difference, float32':<32} {'loss':>9} {'reference':>9} {'gradient':>9}")
    for label, a, b in rows:
        (loss, _, grad), (loss2, _, grad2) = found[a], found[b]
        print(
            f"{label:<32} {abs(loss - loss2) / loss2:>9.1e} {gap(refs[a], refs[b]):>9.1e} {gap(grad, grad2):>9.1e}",
            flush=True,
        )


def row_lengths(loader: PairLoader) -> np.ndarray:
    """What trl_trainer sorts its rows by."""
    return loader.lengths[:, 0] + loader.lengths[:, 1:].max(1)


def their_gradient(
    options: argparse.Namespace,
    dataset: Dataset,
    root: Path,
    shape: ModelConfig,
    weights: dict[str, torch.Tensor],
    moved: dict[str, torch.Tensor],
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """TRL's mean loss, its reference's logps in the order of its rows, and its gradient."""
    theirs = hf_model(shape, weights)
    trainer, _ = trl_trainer(options, theirs, dataset, root, 4)  # its reference is computed with these weights
    theirs.load_state_dict(moved, strict=False)
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    columns = trainer.train_dataset
    for begin in range(0, len(columns), 4):
        batch = trainer.data_collator([columns[i] for i in range(begin, min(begin + 4, len(columns)))])
        loss = trainer.compute_loss(trainer.model, batch)
        size = len(batch["input_ids"]) // 2
        (loss * size / len(columns)).backward()
        total += float(loss) * size
    logps = torch.tensor([list(columns["ref_chosen_logps"]), list(columns["ref_rejected_logps"])]).T
    return total / len(columns), logps, gradient_of(theirs)


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
    from mmdata.shards.loader import assemble

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
    """Peak of the 104M model at 8 pairs of 2 x 1,024 tokens, computed: bytes alive at once in a step under bf16 autocast, run
    on tensors without data; then what preflight reckons and which micro-batch it takes on cards of two sizes."""
    from unittest.mock import patch

    with patch("mmtrain.model.model.spares", lambda _: True):  # as on CUDA
        memory_tables(MODEL_SHAPES["minimind2"], 8 * 2 * 1024)


def memory_tables(shape: ModelConfig, tokens: int) -> None:
    """Print both."""
    kept = {"eager": saved_bytes(lambda block: block), "compiled": saved_bytes(compiled)}
    print(f"a block keeps {kept['eager'] / 1e3:.1f} KB a token, compiled {kept['compiled'] / 1e3:.1f} KB")
    print(f"{'104M, GB (computed)':<44} {'eager':>7} {'compiled':>9} {'preflight':>10}")
    for name, at_once, checkpoints in (
        ("8 x 2 x 1,024 at once", tokens, False),
        ("the same in two micro-batches", tokens // 2, False),
        ("blocks computed again, all at once", tokens, True),
        ("blocks computed again, two micro-batches", tokens // 2, True),
    ):
        eager = live_peak(shape, at_once, checkpoints) + 8 * shape.num_params  # AdamW's moments
        num_blocks = 1 if checkpoints else shape.num_layers
        fused = eager - (kept["eager"] - kept["compiled"]) * at_once * num_blocks
        reckoned = sum(card_memory(shape, kept["compiled"], checkpoints).parts(at_once).values())
        print(f"{name:<44} {eager / 1e9:>7.2f} {fused / 1e9:>9.2f} {reckoned / 1e9:>10.2f}")
    for card, free in ((8, 7.4e9), (24, 23.2e9)):
        for name, checkpoints in (("", False), (" --checkpoint-activations", True)):
            found = card_memory(shape, kept["compiled"], checkpoints)
            most = preflight.MOST_CHECKPOINTED_TOKENS if checkpoints else preflight.MOST_MICRO_TOKENS
            chosen = min(found.largest(2 * MAX_LEN, int(preflight.HEADROOM * free)), most, tokens)
            print(f"{card} GB card, {free / 1e9:.1f} free{name}: {chosen:,} tokens at once")


def compiled(block: torch.nn.Module) -> Any:
    """A block as the compiler cuts it into forward and backward, run without its kernels."""
    return torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)


def card_memory(shape: ModelConfig, kept: float, checkpoints: bool) -> preflight.Memory:
    """What preflight makes of these bytes a token and block on CUDA."""
    n = shape.num_params
    fixed = {"weights": 4 * n, "gradient": 4 * n, "optimizer": 8 * n, "low-precision weights": 2 * n}
    a_token = kept + 4 * shape.hidden_size * shape.num_layers if checkpoints else kept * shape.num_layers
    return preflight.Memory(fixed, a_token, 1.0, shape, 0.0)


def live_peak(shape: ModelConfig, tokens: int, checkpoints: bool) -> int:
    """The most bytes alive at once in a forward and backward pass over documents of MAX_LEN, all tokens trained: weights,
    gradient, what is kept and what comes and goes. Nothing is computed: tensors have a shape and no data."""
    from unittest.mock import patch

    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmtrain.model.logps import trained_logps
    from mmtrain.model.model import AttentionLayout

    ends = torch.arange(0, tokens + 1, MAX_LEN, dtype=torch.int32)
    layout = AttentionLayout(None, None, [(tokens // MAX_LEN, MAX_LEN)], ends, MAX_LEN)
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        model = Model(shape)
        model.checkpoints_blocks = checkpoints
        flat_gradient(model)
        ids = torch.zeros(tokens, dtype=torch.int64)
        with patch("mmtrain.model.model.make_layout", lambda *_: layout), torch.autocast("cpu", torch.bfloat16):
            hidden = model(ids, ids, ends, MAX_LEN)
        trained_logps(hidden, model.head_weight, ids, ids[1:], dtype=torch.bfloat16).sum().backward()
    return alive.peak


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, and gone again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        at, size = id(storage), storage.nbytes()
        if at in self._known and self._known[at]() is storage:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[at]

        self._known[at] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def saved_bytes(wrap: Callable[[torch.nn.Module], Any]) -> float:
    """Bytes a token that one block of the 104M model keeps for its backward pass, under bf16 autocast: the slope between 128
    and 256 tokens, so that what depends on the weights alone is left out."""
    from dataclasses import replace

    from mmtrain.model.model import make_layout, rotary_table

    shape = replace(MODEL_SHAPES["minimind2"], num_layers=1)
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
    parser.add_argument(
        "--init", type=Path, help="exact: a trained run to look at beside new weights, of that tokenizer"
    )
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
