"""What a person does with a trained model: export, import, measure, compare; and the mistakes on that way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, fine, refused


@pytest.fixture
def trained(home: Path, mm: Run, built_once: Callable[..., Path]) -> Path:
    """The same directory with a small sft run."""

    def build(out: Path) -> None:
        fine(mm("pack data/sft_512.jsonl --val-fraction 0.1"))
        fine(mm("pack data/dpo.jsonl --val-fraction 0.1"))
        fine(mm("train sft --model tiny --steps 2 --quiet"))
        for name in ("shards", "runs"):
            shutil.move(home / name, out / name)

    made = built_once("after", build)
    for name in ("shards", "runs"):
        shutil.copytree(made / name, home / name)
    return home


def test_a_model_goes_out_and_comes_back(trained: Path, mm: Run) -> None:
    ran = fine(mm("export runs/sft-1"))
    ways = ["mm chat exports/sft-1-hf", "hf upload sft-1 exports/sft-1-hf", "mm export runs/sft-1 --format gguf"]
    assert f"next: {'    or    '.join(ways)}\n" in ran.err
    assert "logits differ by at most" in ran.out and "wrote exports/sft-1-hf: LlamaForCausalLM" in ran.out
    ran = fine(mm("export runs/sft-1 --format gguf --dtype q8_0 --out g"))
    assert (trained / "g" / "sft-1-q8_0.gguf").is_file() and "next: llama-cli -m g/sft-1-q8_0.gguf" in ran.err
    assert "    or    ollama create sft-1 -f g/Modelfile\n" in ran.err
    assert (trained / "g/Modelfile").read_text().startswith("FROM ./sft-1-q8_0.gguf\nPARAMETER stop ")
    ran = fine(mm("import exports/sft-1-hf --out runs/back"))
    assert "every value as it was" in ran.out
    asked = "--prompt 'one and two?' --max-new-tokens 4 --temperature 0 --json"
    answers = [
        json.loads(fine(mm(f"chat {path} {asked}")).out)["answer"]
        for path in ("runs/sft-1", "exports/sft-1-hf", "runs/back")
    ]
    assert len(set(answers)) == 1
    fine(mm("train sft --init runs/back --steps 1 --quiet --out runs/on"))
    refused(mm("train sft --out runs/back --resume"), "runs/back")
    refused(mm("export runs/sft-1 --format minimind"), "MiniMind's code makes no model with", "--format hf")
    refused(mm("export runs/sft-1 --format onnx"), "--format onnx")
    refused(mm("import exports/sft-1-hf --out runs/back"), "is already there")


def test_a_model_is_measured(trained: Path, mm: Run) -> None:
    figures = json.loads(
        fine(mm("eval runs/sft-1 --data shards/sft_512 --data shards/dpo --per-sequence rows.jsonl --json")).out
    )
    assert figures["datasets"]["shards/sft_512"]["all"]["loss"] > 0
    assert 0 <= figures["datasets"]["shards/dpo"]["all"]["accuracy"] <= 1
    lines = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == figures["per_sequence"]["lines"]
    assert {"file", "line", "tokens", "nll"} <= lines[0].keys()
    (trained / "q.jsonl").write_text('{"question": "one and two?", "answer": "three."}\n')
    (trained / "c.jsonl").write_text('{"question": "one and two?", "choices": ["three.", "four."], "answer": "A"}\n')
    ran = fine(mm("eval runs/sft-1 --questions q.jsonl --choices c.jsonl --max-new-tokens 3 --noisiest 2"))
    assert "of 1 questions answered word for word" in ran.out and "least likely rows" in ran.out
    refused(mm("eval runs/sft-1 --questions none.jsonl"), "none.jsonl: no such file")
    refused(mm("eval runs/sft-1 --split test"), "--split test")
    refused(mm("eval runs/sft-1 --limit 3"), "--limit belongs to --lm-eval")


def test_several_models_answer_side_by_side(trained: Path, mm: Run) -> None:
    ran = fine(mm("chat --compare runs/sft-1 runs/sft-1/checkpoints/step-2 --prompt hello --max-new-tokens 3"))
    assert ran.out.startswith("== runs/sft-1\n") and "\n== runs/sft-1/checkpoints/step-2\n" in ran.out
    refused(mm("chat --compare runs/sft-1 --prompt x"), "needs two models")
    refused(mm("chat runs/sft-1 runs/sft-1 --prompt x"), "several models are for --compare")
    refused(mm("chat runs/sft-1 --prompt x --top-p 0"), "top-p")


def test_damage_is_one_error(trained: Path, mm: Run) -> None:
    (trained / "empty").mkdir()
    for command in ("chat empty --prompt x", "eval empty", "export empty"):
        refused(mm(command), "empty")
    weights = next((trained / "runs/sft-1/checkpoints").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    for command in ("chat runs/sft-1 --prompt x", "eval runs/sft-1", "export runs/sft-1"):
        refused(mm(command), "none of its checkpoints is complete")
    (trained / "evil.pth").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    refused(mm("import evil.pth"), "evil.pth", "holds more than weights")
    shutil.rmtree(trained / "runs/sft-1/checkpoints")
    refused(mm("export runs/sft-1"), "it holds no checkpoint")
