"""lm-eval, unmodified, scores the same tasks through our server's protocol and with transformers in its own process.

A server that gives no log-probabilities of an echoed prompt is scored at chance without a word (llama.cpp #27174): here
every sample's log-likelihood is held against the one that transformers computes. Needs `make peers ROOM=serving`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import at_most, report
from benchmarks.serving.contenders.model import library_texts
from sihe.models.config import ModelConfig

HARNESS = Path(__file__).parents[1] / "peers" / ".venv-serving-lmeval" / "bin" / "lm_eval"
SAMPLES = 40
END = "<|end|>"
SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=512,
    max_positions=2048,
    tie_embeddings=False,
    eos_token_id=0,
)
TOLERANCE = 2e-3  # nats of a whole continuation: sums of float32 in another order
_CHOICES = """task: sihe_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_TEXT = """task: sihe_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def main() -> int:
    """Runs both and compares; 1 where the harness is not installed or a run fails."""
    if not HARNESS.exists():
        print(f"{HARNESS} is not there: run  make peers ROOM=serving", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        folder = make_model(home / "model")
        write_tasks(home)
        inside = evaluate(home, "hf", f"pretrained={folder},dtype=float32,max_length=1024", "--device", "cpu")
        with Served(home, folder) as url:
            arguments = (
                f"model=served,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder},"
                "max_length=1024,num_concurrent=4,max_retries=1"
            )
            outside = evaluate(home, "local-completions", arguments)
    differences = [abs(ours - theirs) for ours, theirs in zip(scores(outside), scores(inside), strict=True)]
    greedy = sum(ours != theirs for ours, theirs in zip(greedy_flags(outside), greedy_flags(inside), strict=True))
    for task, name in (
        *(("sihe_choices", "acc,none"), ("sihe_choices", "acc_norm,none")),
        *(("sihe_text", "word_perplexity,none"), ("sihe_text", "bits_per_byte,none")),
    ):
        print(f"{name}: served {metric(outside, task, name)}, transformers {metric(inside, task, name)}")
    print(
        f"{len(differences)} log-likelihoods, largest difference {max(differences):.2e}, is_greedy differs in {greedy}"
    )
    report(
        __file__,
        [
            at_most("largest difference of a log-likelihood", max(differences), unit="nats", limit=TOLERANCE),
            at_most("samples whose greedy flag differs", greedy, unit="samples", limit=0),
        ],
    )
    return 0


def make_model(folder: Path) -> Path:
    """A small model with random weights, wide enough that its choices are its own, and an end-of-sequence token, from
    which the harness lets a text begin."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sihe.models.checkpoint import save_model
    from sihe.models.decoder import Decoder

    torch.manual_seed(0)
    model = Decoder(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    save_model(model, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_texts(1_000_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


def write_tasks(home: Path) -> None:
    """Two tasks over sources of Python's library: which line comes next, and how likely a text is."""
    lines = [line for text in library_texts(400_000) for line in text.splitlines() if 20 < len(line) < 80]
    source = random.Random(0)
    with (home / "choices.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(SAMPLES):
            at = source.randrange(len(lines) - 4)
            choices = ["\n" + lines[at + 3], *("\n" + source.choice(lines) for _ in range(3))]
            gold = source.randrange(4)
            choices[0], choices[gold] = choices[gold], choices[0]
            file.write(json.dumps({"text": "\n".join(lines[at : at + 3]), "choices": choices, "gold": gold}) + "\n")
    with (home / "text.jsonl").open("w", encoding="utf-8") as file:
        for at in range(0, 5 * 40, 40):
            file.write(json.dumps({"text": "\n".join(lines[at : at + 40])}) + "\n")
    tasks = home / "tasks"
    tasks.mkdir()
    (tasks / "choices.yaml").write_text(_CHOICES.format(data=home / "choices.jsonl"), encoding="utf-8")
    (tasks / "text.yaml").write_text(_TEXT.format(data=home / "text.jsonl"), encoding="utf-8")


def evaluate(home: Path, model: str, arguments: str, *more: str) -> dict[str, Any]:
    """The harness's results and samples for one way to ask the model. Raises `CalledProcessError`."""
    output = home / f"results-{model}"
    command = [
        *(str(HARNESS), "--model", model, "--model_args", arguments, "--tasks", "sihe_choices,sihe_text"),
        *("--include_path", str(home / "tasks"), "--output_path", str(output), "--log_samples", "--batch_size", "8"),
        *more,
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        done.check_returncode()
    (results,) = output.rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    found["samples"] = {
        task: [
            json.loads(line) for path in output.rglob(f"samples_{task}_*.jsonl") for line in path.open(encoding="utf-8")
        ]
        for task in ("sihe_choices", "sihe_text")
    }
    return found


def scores(found: dict[str, Any]) -> list[float]:
    """Every log-likelihood of a run, in the order of its samples."""
    choices = [
        float(answer[0])
        for sample in sorted(found["samples"]["sihe_choices"], key=lambda sample: sample["doc_id"])
        for answer in sample["filtered_resps"]
    ]
    texts = [
        _number(sample["filtered_resps"][0])
        for sample in sorted(found["samples"]["sihe_text"], key=lambda sample: sample["doc_id"])
    ]
    return choices + texts


def greedy_flags(found: dict[str, Any]) -> list[str]:
    """Whether the model itself would have said each continuation."""
    return [
        str(answer[1])
        for sample in sorted(found["samples"]["sihe_choices"], key=lambda sample: sample["doc_id"])
        for answer in sample["filtered_resps"]
    ]


def metric(found: dict[str, Any], task: str, name: str) -> float:
    """One figure of a run."""
    return float(found["results"][task][name])


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


class Served:
    """`sihe up` over the model, in a process of its own."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._home = home / "sihe"
        self._folder = folder

    def __enter__(self) -> str:
        from sihe.core import settings
        from sihe.core.workspace import Workspace
        from sihe.serving.engine.config import EngineConfig
        from sihe.serving.gateway.gateway import Gateway

        self._home.mkdir()
        with Workspace(settings.load({"home": str(self._home)}, environ={}, directory=self._home)) as workspace:
            workspace.tracking.register_model("served", self._folder)
            Gateway(workspace).deploy("served", "served", settings=EngineConfig(dtype="float32", max_context=1025))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {**os.environ, "SIHE_HOME": str(self._home), "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-m", "sihe", "up", "--port", str(port)]
        self._process = subprocess.Popen(command, env=environment, cwd=self._home, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{url}/v1/models", timeout=5).json()["data"]:
                    return url
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        self.__exit__()
        raise RuntimeError("the server did not become ready")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
