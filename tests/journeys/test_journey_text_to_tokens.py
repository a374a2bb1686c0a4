"""The journeys that exist, walked as a user walks them: the real command line, a real server, the unmodified client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

MODEL = ("hidden_size=32", "num_layers=2", "num_heads=4", "num_kv_heads=2")
TRAINING = ("sequence_length=32", "micro_batch=2", "global_batch=4", "checkpoint_every=2", "warmup_steps=1")


class House:
    """`sihe` in a home folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sihe", "--home", str(self.home), *arguments]

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout if expect == 0 else done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    @contextmanager
    def up(self, **environ: str) -> Iterator[str]:
        """The address of `sihe up`, which is interrupted at the end and must then exit cleanly."""
        server = subprocess.Popen(
            self.command("up", "--port", "0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("console"), server.communicate(timeout=5)
            yield line.split()[1]
        finally:
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
        assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A house in which files became a data set and the data set two versions of a model."""
    folder = tmp_path_factory.mktemp("journey")
    corpus = folder / "corpus"
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / "json", corpus / "json")
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / "logging", corpus / "logging")
    (corpus / "picture.md").write_bytes(bytes(range(256)) * 10)
    home = House(folder / "home")
    home("text", "prepare", "tiny", str(corpus), "--vocab-size", "512", "--held-out", "0.2", "--exclude", "__pycache__")
    for steps in ("4", "6"):
        settings = [f"model.{item}" for item in MODEL] + [*TRAINING, f"max_steps={steps}", "model_name=tiny"]
        flags = [part for item in settings for part in ("--set", item)]
        home("train", "run", "--config", "nano-1m", "--dataset", "tiny", *flags)
    return home


def test_text_to_model(house: House) -> None:
    shown = house.json("models", "show", "tiny@2")
    assert [edge.split(":")[0] for edge in shown["lineage"]] == ["model", "run", "dataset"]
    assert shown["lineage"][-1].split(" ← ")[1].startswith("table:documents@")
    runs = house.json("train", "list")
    assert [run["status"] for run in runs] == ["FINISHED", "FINISHED"]
    measured = house.json("eval", "perplexity", "tiny@2", "tiny")
    assert 1 < measured["perplexity"] < 512 * 1.2  # about the vocabulary's size: it has hardly learnt anything


def test_request_to_tokens(house: House) -> None:
    house("models", "alias", "tiny", "production", "1")
    house("deploy", "create", "writer", "tiny@production")
    with (
        house.up(SIHE_SERVER_API_KEYS="right") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=20) as client,
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as stranger,
    ):
        first = client.completions.create(model="writer", prompt="import", max_tokens=5, temperature=0)
        assert first.system_fingerprint == "tiny@1"
        assert first.usage is not None
        assert first.usage.completion_tokens <= 5
        chat = client.chat.completions.create(
            model="writer", messages=[{"role": "user", "content": "hello"}], max_tokens=5, stream=True
        )
        chunks = list(chat)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")
        with pytest.raises(openai.BadRequestError) as too_long:
            client.completions.create(model="writer", prompt="import os\n" * 200)
        assert too_long.value.code == "context_length_exceeded"
        house("models", "alias", "tiny", "production", "2")  # another process moves the alias
        versions = set()
        for _ in range(500):
            versions.add(client.completions.create(model="writer", prompt="a", max_tokens=1).system_fingerprint)
            if "tiny@2" in versions:
                break
        assert versions <= {"tiny@1", "tiny@2"}
        assert "tiny@2" in versions


def test_document_to_answer(house: House, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    text = "# Retries\n\nA request is retried at most twice.\n\n写请求不会自动重试，因为它们可能已经生效。\n"
    (notes / "decisions.md").write_text(text, encoding="utf-8")
    house("index", "build", "notes", str(notes))
    for question in ("How often is a request retried?", "写请求会自动重试吗?"):
        answer = house.json("ask", question, "--index", "notes")
        assert answer["citations"], question
        for citation in answer["citations"]:
            assert text[citation["start"] : citation["end"]] == citation["quote"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "run", "--config", "nano-1m", "--dataset", "none"), 1, "none"),
        (("train", "run", "--config", "nano-1m", "--dataset", "tiny", "--set", "max_step=3"), 2, "max_step"),
        (("deploy", "create", "x", "nothing@production"), 1, "nothing"),
        (("ask", "why?", "--index", "none"), 1, "none"),
        (("eval", "perplexity", "tiny@9", "tiny"), 1, "tiny@9"),
        (("lab", "run", "no.lab"), 1, "no.lab"),
        (("coach", "show", "no-question"), 1, "no-question"),
        (("up", "--port", "70000"), 2, "--port"),
        (("--set", "server.prot=1", "up"), 2, "server.prot"),
        (("text", "prepare", "x", "/no/such/folder"), 1, "/no/such/folder"),
    ],
)
def test_wrong_input_is_one_clear_line(house: House, arguments: tuple[str, ...], code: int, said: str) -> None:
    message = house(*arguments, expect=code)
    assert said in message


def test_a_port_in_use_is_named(house: House) -> None:
    with house.up() as url:
        port = url.rpartition(":")[2]
        assert port in house("up", "--port", port, expect=1)


def test_a_missing_extra_gives_its_install_line() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from sihe.core.storage import ObjectStore\n"
        "try: ObjectStore('s3://bucket/x')\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("MissingExtra")
    assert "pip install 'sihe[s3]'" in said
