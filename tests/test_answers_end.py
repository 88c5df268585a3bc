"""A model trained for 120 steps on ten questions stops at the same place in chat, the server and the programs it is exported for."""

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import endings
import pytest
import torch
from serving import served

from mmdata.encode.template import ending_of
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.commands.chat import open_speaker
from mmtrain.config import TrainOptions
from mmtrain.convert.export import export
from mmtrain.convert.foreign import import_model, open_model
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.train.loop import train

COLOURS = ("red", "blue", "green", "white", "black", "pink", "gold", "grey", "brown", "orange")
ANSWERS = {f"Colour {i}?": f"It is {colour}." for i, colour in enumerate(COLOURS)}
MOST = 24  # the most tokens of an answer, far more than one has


def trained_run(root: Path, name: str, steps: int = 120) -> Path:
    """Train a run on the ten questions, with the token appended to answers whose template ends none."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ANSWERS.items()
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    token = None if endings.KINDS[name].ends else "<|endoftext|>"
    chosen = PackOptions(tokenizer=endings.directory(name), max_len=64, val_fraction=0, workers=1, end_of_turn=token)
    pack([root / "rows.jsonl"], root / "data", chosen)
    options = TrainOptions(
        "sft", (root / "data",), root / name, model="tiny", steps=steps, lr=1e-2, batch_tokens=256, device="cpu", quiet=True,
        report=False, samples=False,
    )  # fmt: skip
    train(options)
    return root / name


def chat_answers(run: Path) -> dict[str, tuple[str, int]]:
    """Text and number of tokens of each answer of `mm chat`; all have ended by themselves."""
    chat = open_speaker(run, None, is_plain=False, window=256).chat
    found = {}
    for question in ANSWERS:
        chat.messages.clear()
        text = "".join(chat.ask(question, Sampling(max_new_tokens=MOST)))
        assert chat.row and chat.row.finish_reason == "stop", text
        found[question] = (text, len(chat.row.ids))
    return found


def served_answers(run: Path) -> dict[str, tuple[str, int]]:
    """As `chat_answers`, of `mm serve`."""
    found = {}
    with served(Engine(*open_model(run), window=256)) as url:
        for question in ANSWERS:
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MOST}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request) as response:
                reply = json.load(response)
            (choice,) = reply["choices"]
            assert choice["finish_reason"] == "stop"
            found[question] = (choice["message"]["content"], reply["usage"]["completion_tokens"])
    return found


def transformers_answers(directory: Path) -> dict[str, tuple[str, int]]:
    """As `chat_answers`, of transformers with the sampling of greedy decoding and the export's generation_config.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    texts = list(ending_of(Tokenizer.load(directory)).texts)
    more = {"stop_strings": texts, "tokenizer": tokenizer} if texts else {}
    found = {}
    for question in ANSWERS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=MOST,
                attention_mask=torch.ones(1, len(prompt)),
                **more,
            )[0, len(prompt) :].tolist()
        is_token = ids[-1] in eos
        text = tokenizer.decode(ids[: len(ids) - is_token], clean_up_tokenization_spaces=False)
        found[question] = (next((text.partition(end)[0] for end in texts if end in text), text), len(ids) - is_token)
        assert is_token or texts, text
    return found


def llama_cpp_answers(file: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of the answers of llama.cpp, with the prompts of its own template and the stop texts of the Modelfile."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads = str(file), 256, 1, 1
    options.verbosity, options.use_jinja, options.force_pure_content_parser = -1, True, True
    server, found = xllamacpp.Server(options), {}
    more = {"temperature": 0, "max_tokens": MOST, "stop": list(ending_of(tokenizer).texts)}
    for question in ANSWERS:
        reply = server.handle_chat_completions({"messages": [{"role": "user", "content": question}], **more})
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "stop", reply
        found[question] = choice["message"]["content"]
    return found


def test_a_model_learns_in_few_steps_to_end_its_answers(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "phi3", steps=40)
    answers = chat_answers(run)
    assert served_answers(run) == answers and all(text.startswith("It is ") for text, _ in answers.values())


@pytest.fixture(scope="module", params=endings.KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each tokenizer. Its directory's name is that of the tokenizer."""
    return trained_run(tmp_path_factory.mktemp("runs"), request.param)


@pytest.mark.slow
def test_an_answer_ends_at_the_same_place_everywhere(run: Path, tmp_path: Path) -> None:
    name, answers = run.name, chat_answers(run)
    written = {"channels": "<|channel|>final<|message|>", "mistral": " "}.get(
        name, ""
    )  # by the model, before the answer
    assert {question: text for question, (text, _) in answers.items()} == {q: written + a for q, a in ANSWERS.items()}
    assert served_answers(run) == answers
    export(run, tmp_path / "hf", format="hf")
    assert transformers_answers(tmp_path / "hf") == answers
    import_model(tmp_path / "hf", tmp_path / "again")
    assert chat_answers(tmp_path / "again") == answers


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("xllamacpp"), reason="llama.cpp is not installed: pip install xllamacpp"
)
def test_llama_cpp_ends_an_answer_at_the_same_place(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path, format="gguf")
    assert llama_cpp_answers(tmp_path / f"{run.name}-f32.gguf", open_model(run)[1]) == {
        question: text.strip()
        for question, (text, _) in chat_answers(run).items()  # it strips them
    }
