"""Decoding on the CPU: our engine beside transformers' generate on the same weights, prompts and threads, in turns.

    python tests/bench/generate.py [--model minimind2] [--rows 1 8] [--tokens 64] [--rounds 5]

Time of a token is that of an answer of `--tokens` less that of an answer of one, by the tokens between; medians over rounds
in which the two take turns. Both must say the same tokens. Weights are random: speed does not depend on them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mmdata.encode.template import Ending
from mmdata.tokenizer.tokenizer import CHATML, train_bpe
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES

NUM_PROMPT = 64


def main() -> None:
    """Measure and print one line for each number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="minimind2", choices=("minimind2", "minimind2-small"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    ours, theirs = make(options.model)
    num_params = MODEL_SHAPES[options.model].num_params
    print(f"{options.model}: {num_params:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {version('transformers')}; prompt {NUM_PROMPT}, answer {options.tokens}")  # fmt: skip
    for num_rows in options.rows:
        prompts = torch.randint(3, 6400, (num_rows, NUM_PROMPT), generator=torch.Generator().manual_seed(num_rows))

        def engine(count: int, prompts: torch.Tensor = prompts) -> list[list[int]]:
            rows = [ours.submit(prompt, Sampling(max_new_tokens=count)) for prompt in prompts.tolist()]
            while not ours.is_idle:
                ours.step()
            return [row.ids for row in rows]

        def peer(count: int, prompts: torch.Tensor = prompts) -> list[list[int]]:
            mask = torch.ones_like(prompts)
            said = theirs.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=-1)
            return said[:, NUM_PROMPT:].tolist()

        assert engine(options.tokens) == peer(options.tokens), "the two say different tokens"
        times = compare({"mm": engine, "transformers": peer}, options.tokens, options.rounds)
        per_token = {name: 1e3 * statistics.median(found) for name, found in times.items()}
        spread = {name: f"{1e3 * min(found):.1f}-{1e3 * max(found):.1f}" for name, found in times.items()}
        print(f"{num_rows} rows: " + ", ".join(
            f"{name} {num_rows / per_token[name] * 1e3:.1f} tokens/s ({per_token[name]:.1f} ms a step, {spread[name]})"
            for name in per_token
        ) + f", ratio {per_token['transformers'] / per_token['mm']:.2f}")  # fmt: skip


def make(name: str) -> tuple[Engine, LlamaForCausalLM]:
    """An engine and a transformers model with the same random weights; neither ends an answer early."""
    shape = MODEL_SHAPES[name]
    torch.manual_seed(0)
    model = Model(shape).eval()
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight})
    with tempfile.TemporaryDirectory() as directory:
        control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        tokenizer = train_bpe(
            ["a b"], vocab_size=300, control_tokens=control, chat_template=CHATML, out_dir=Path(directory)
        )
    engine = Engine(model, tokenizer)
    engine.ending = Ending(())
    return engine, theirs


def compare(work: dict[str, Callable[[int], list[list[int]]]], num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a decoding step of each took, round after round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            begin = time.perf_counter()
            run(1)
            middle = time.perf_counter()
            run(num_tokens)
            whole, first = time.perf_counter() - middle, middle - begin
            times[name].append((whole - first) / (num_tokens - 1))
    return times


if __name__ == "__main__":
    main()
