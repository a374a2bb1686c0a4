"""LoRA adapters in a running engine: each request gets what the merged model would say, whatever runs beside it."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch

from sihe.core.errors import AlreadyExists, Busy, CorruptData, NotFound
from sihe.models.checkpoint import load_model, save_model
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.errors import CheckpointMismatch
from sihe.models.lora import apply_lora
from sihe.models.lora_config import TARGETS, LoraConfig
from sihe.models.lora_files import save_adapter
from sihe.serving.engine.adapters import AdapterShelf, read_adapter
from sihe.serving.engine.compute.cpu.compute import CpuCompute
from sihe.serving.engine.compute.paged import TorchCompute
from sihe.serving.engine.compute.step import Compute, Feed, Step
from sihe.serving.engine.kv.storage import KvPages

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=56,
    max_positions=64,
)
TOKENS = [5, 9, 2, 33, 60, 1, 1, 7, 19, 20, 3, 8, 41, 22, 17, 50, 4, 11]
SHAPES = {
    "wide": LoraConfig(rank=6, alpha=9, targets=TARGETS),
    "narrow": LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj")),
    "mlp": LoraConfig(rank=3, targets=("up_proj", "down_proj"), rslora=True),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters of it, as folders."""
    home = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    model = Decoder(CONFIG)
    save_model(model, home / "model")
    for name, shape in SHAPES.items():
        adapted = copy.deepcopy(model)
        lora = apply_lora(adapted, shape, name)
        with torch.no_grad():
            for _, a, b in lora.matrices(name):
                a.normal_(std=0.3)
                b.normal_(std=0.3)
        save_adapter(lora, name, home / name)
        lora.merge()
        save_model(adapted, home / f"merged {name}")
    return home


def computing(home: Path, kind: str) -> Compute:
    model = load_model(home / "model").eval()
    pages = KvPages(CONFIG, num_blocks=16, dtype=torch.float32)
    if kind != "cpu":
        return TorchCompute(model.requires_grad_(False), pages, compile=kind == "compiled")
    return CpuCompute(model, pages, "float32", max_adapters=3, threads=2)


def merged(home: Path, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(home / name).eval()(torch.tensor([TOKENS]))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("kind", ["cpu", "torch", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_batch_of_several_adapters_gives_what_each_merged_model_gives(home: Path, kind: str) -> None:
    compute = computing(home, kind)
    for number, name in enumerate(SHAPES, 1):
        compute.set_adapter(number, read_adapter(home / name, CONFIG))
    feeds = [Feed(TOKENS, 0, [2 * at, 2 * at + 1], len(TOKENS), adapter=at) for at in range(4)]
    found = compute.forward(Step.of(feeds)).clone().chunk(4)
    for at, name in enumerate(("model", *(f"merged {name}" for name in SHAPES))):
        torch.testing.assert_close(found[at], merged(home, name), atol=2e-5, rtol=1e-4)
    compute.set_adapter(2, None)
    for number in (2, 0):  # removed, and none: the latter is compiled where that is asked for
        again = compute.forward(Step.of([Feed(TOKENS, 0, [0, 1], len(TOKENS), adapter=number)]))
        torch.testing.assert_close(again, merged(home, "model"), atol=2e-5, rtol=1e-4)
    compute.close()


def test_adapters_leave_the_others_bits_alone(home: Path) -> None:
    compute = computing(home, "cpu")
    alone = compute.forward(Step.of([Feed(TOKENS, 0, [0, 1], len(TOKENS))])).clone()
    broken = read_adapter(home / "wide", CONFIG)
    for _, a, _b in broken.matrices("served"):
        a.data.fill_(torch.nan)
    compute.set_adapter(1, broken)
    feeds = [Feed(TOKENS, 0, [4, 5], len(TOKENS), adapter=1), Feed(TOKENS, 0, [2, 3], len(TOKENS))]
    poisoned, beside = compute.forward(Step.of(feeds)).chunk(2)
    assert torch.isnan(poisoned).any()
    assert torch.equal(beside, alone)
    # The blocks of the broken one go on to another sequence.
    assert torch.equal(compute.forward(Step.of([Feed(TOKENS, 0, [4, 5], len(TOKENS))])), alone)
    compute.close()


def test_an_adapter_of_another_model_or_a_broken_one_is_refused(home: Path, tmp_path: Path) -> None:
    other = ModelConfig(**{**CONFIG.__dict__, "hidden_size": 48})
    with pytest.raises(CheckpointMismatch, match="shape"):
        read_adapter(home / "wide", other)
    with pytest.raises(NotFound):
        read_adapter(tmp_path, CONFIG)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((home / "wide" / name).read_bytes()[:100])
    with pytest.raises(CorruptData):
        read_adapter(tmp_path, CONFIG)


def test_a_place_is_free_again_when_its_last_request_has_ended() -> None:
    shelf = AdapterShelf(places=1)
    first = shelf.reserve("a")
    with pytest.raises(NotFound):
        shelf.hold("a")  # not yet open
    shelf.open(first)
    with pytest.raises(AlreadyExists):
        shelf.reserve("a")
    with pytest.raises(Busy, match="all 1 places"):
        shelf.reserve("b")
    held = shelf.hold("a")
    with pytest.raises(Busy, match="1 requests"):
        shelf.leave("a", timeout_s=0)
    assert shelf.names == ("a",)
    leaving = threading.Thread(target=lambda: shelf.forget(shelf.leave("a", timeout_s=None)))
    leaving.start()
    shelf.release(held)
    leaving.join()
    with pytest.raises(NotFound):
        shelf.hold("a")
    again = shelf.reserve("a")
    assert again.number == first.number
    assert again.key != first.key  # what was cached of the first is not the second's
    assert shelf.hold("").number == 0
