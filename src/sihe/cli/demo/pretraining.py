"""Stages 2 and 3: a 10 M-parameter model on two ranks, one of which is killed half way; then its perplexity."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from sihe.cli.demo.journal import Figures
from sihe.cli.demo.stage import Walk

MODEL = "demo-10m"
BATCH, LENGTH = 8, 256
_TARGET_S = 65.0  # how long the training should take on this machine
_FEWEST, _MOST = 24, 120  # steps: fewer show nothing, more are not needed to show it
_INTERVALS = 6  # checkpoints of a run
_RESTARTS = 100  # more than anybody interrupts one walk


def train(walk: Walk) -> Figures:
    """Trains, kills a rank once, and compares the steps that were computed twice."""
    from sihe.cluster.launchers.local import LocalLauncher
    from sihe.training.presets.reader import load_config
    from sihe.training.service import TrainingService

    steps = _steps(walk)
    overrides = {"dataset": str(walk.figure("corpus", "folder")), "model_name": MODEL, "max_steps": steps}
    overrides |= {"global_batch": BATCH, "micro_batch": BATCH // 2, "sequence_length": LENGTH}
    overrides |= {"checkpoint_every": steps // _INTERVALS, "keep_checkpoints": _INTERVALS + 1}
    overrides |= {"peak_lr": 1e-3, "warmup_steps": steps // 6}
    overrides["seed"] = walk.journal.walk  # another walk is another run
    # An attempt that is killed together with the demo counts as a failure of the job, and calling again is no mistake.
    overrides["max_restarts"] = _RESTARTS
    config = load_config("nano-10m", overrides)
    narrator = _Narrator(walk, steps=steps, kill_at=steps // _INTERVALS * 3 - 1)
    started = time.perf_counter()
    # Here, whatever the settings say: the rank that is killed must be a process of this machine.
    result = TrainingService(walk.workspace, launcher=LocalLauncher()).train(config, on_event=narrator)
    seconds = time.perf_counter() - started
    version = result.model_version
    figures: Figures = {"run": result.run_id, "model": version.key, "version": version.version}
    figures |= {"loss": result.final_loss, "tokens_per_s": result.tokens_per_s, "steps": result.steps}
    figures |= {"parameters": narrator.parameters, "seconds": seconds, **_replayed(result.folder / "events.jsonl")}
    figures |= {"early_step": config.checkpoint_every, "down_s": walk.journal.note("down_s")}
    walk.screen.detail(
        f"loss {result.final_loss:.3f} after {result.steps} steps, {result.tokens_per_s:,.0f} tokens/s; "
        f"{figures['replayed']} steps were computed twice, {figures['replayed_equal']} of them bit-equal"
    )
    return figures


def _steps(walk: Walk) -> int:
    """How many steps this machine does in the target time; measured once a walk, so that a resumed run is the same."""
    kept = walk.journal.note("steps")
    if kept is None:
        rate_tok_per_s = _pace()
        kept = min(max(round(_TARGET_S * rate_tok_per_s / (BATCH * LENGTH)), _FEWEST), _MOST)
        walk.journal.keep("steps", kept)
        walk.screen.detail(f"this machine does about {rate_tok_per_s:,.0f} tokens/s: {kept} steps")
    return int(kept)


def _pace() -> float:
    """Tokens/s of forward and backward: the best of three small batches after one that warms up."""
    import torch

    from sihe.cli.demo.corpus import VOCABULARY
    from sihe.models.config import ModelConfig
    from sihe.models.decoder import Decoder
    from sihe.models.precision import fastest_dtype
    from sihe.training.presets.reader import load_config

    sizes = load_config("nano-10m", {"dataset": "any"}).model.resolved(LENGTH)
    model = Decoder(ModelConfig(vocab_size=VOCABULARY, **sizes)).to(fastest_dtype())
    tokens_BT = torch.randint(VOCABULARY, (2, LENGTH))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        total, _count = model.loss(tokens_BT, tokens_BT)
        torch.autograd.backward(total)
        seconds.append(time.perf_counter() - started)
    return tokens_BT.numel() / min(seconds[1:])


def evaluate(walk: Walk) -> Figures:
    """Perplexity on the held-out split, of the final model and of its earliest checkpoint, which becomes a version."""
    from sihe.apps.evaluation.service import EvaluationService
    from sihe.training.service import TrainingService

    dataset = Path(str(walk.figure("corpus", "folder")))
    early = walk.journal.note("early_version")
    if early is None:
        early = (
            TrainingService(walk.workspace)
            .register_checkpoint(
                str(walk.figure("pretraining", "run")), int(str(walk.figure("pretraining", "early_step")))
            )
            .version
        )
        walk.journal.keep("early_version", early)
    service = EvaluationService(walk.workspace)
    figures: Figures = {"early_version": early, "final_version": walk.figure("pretraining", "version")}
    for name in ("early", "final"):
        measured = service.perplexity(f"{MODEL}@{figures[f'{name}_version']}", dataset)
        figures |= {f"{name}_perplexity": measured.perplexity, "tokens": measured.tokens}
        figures[f"{name}_bits_per_byte"] = measured.bits_per_byte
        walk.screen.detail(
            f"{name:<5} version {figures[f'{name}_version']}: perplexity {measured.perplexity:,.1f}, "
            f"{measured.bits_per_byte:.3f} bits a byte over {measured.tokens:,} held-out tokens"
        )
    return figures


class _Narrator:
    """Shows the run, and kills the last rank once at step `kill_at`."""

    def __init__(self, walk: Walk, *, steps: int, kill_at: int) -> None:
        self._walk = walk
        self._steps = steps
        self._kill_at = kill_at
        self._pids: tuple[int, ...] = ()
        self._killed_at_s: float | None = None
        self.parameters = 0

    def __call__(self, event: object) -> None:
        from sihe.cluster.types import RankFailed, RanksStarted
        from sihe.training.types import AttemptReady, RunOpened, StepDone

        screen = self._walk.screen
        match event:
            case RunOpened():
                self.parameters = event.num_parameters
                verb = "goes on" if event.resumed else "opened"
                screen.detail(
                    f"run {event.run_id[:8]} {verb}: {event.num_parameters / 1e6:.1f} M parameters, two ranks"
                )
            case RanksStarted():
                self._pids = event.pids
            case RankFailed():
                screen.detail(f"rank {event.rank} (process {event.pid}) died: {event.reason}")
            case AttemptReady() if event.step:
                screen.detail(f"both ranks again, after step {event.step}, at sample {event.next_sample:,}")
            case StepDone():
                if self._killed_at_s is not None:
                    self._walk.journal.keep("down_s", time.perf_counter() - self._killed_at_s)
                    self._killed_at_s = None
                screen.progress(
                    f"step {event.step}/{self._steps}  loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tokens/s"
                )
                if event.step >= self._kill_at and not self._walk.journal.note("killed"):
                    self._kill()
            case _:
                pass

    def _kill(self) -> None:
        self._walk.journal.keep("killed", True)
        self._walk.screen.detail(f"kill -9 {self._pids[-1]}: rank {len(self._pids) - 1} dies half way")
        self._killed_at_s = time.perf_counter()
        with suppress(ProcessLookupError):
            os.kill(self._pids[-1], signal.SIGKILL)


def _replayed(log: Path) -> Figures:
    """How many steps the run's log has twice or more, and how many of those have equal samples and equal losses."""
    from sihe.training.progress import EventReader
    from sihe.training.types import StepDone

    seen: dict[int, list[tuple[str, float]]] = {}
    for event in EventReader(log).new():
        if isinstance(event, StepDone):
            seen.setdefault(event.step, []).append((event.samples, event.loss))
    twice = [values for values in seen.values() if len(values) > 1]
    return {
        "replayed": len(twice),
        "replayed_equal": sum(len(set(values)) == 1 for values in twice),
        "losses": [seen[step][-1][1] for step in sorted(seen)],
    }
