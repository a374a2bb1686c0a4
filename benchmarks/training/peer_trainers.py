"""Tokens/s of other trainers on the Llama of `tokens_per_second`; runs in the peers' environment, without sihe.

    trainer      transformers' Trainer
    lightning    Lightning's Trainer

Both as their users would set them up for speed: fused AdamW, clipping, no logging, no checkpoints, autocast in bf16.
The time of a step is that from the end of one to the end of the next, so the trainer's own work counts.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings

LEARNING_RATE = 1e-4
WARM = 2


def main() -> None:
    """One contender, described by a JSON object as the only argument; prints its tokens/s."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**asked["model"]))
    tokens = torch.randint(asked["model"]["vocab_size"], (asked["batch"], asked["length"]))
    run = {"trainer": _trainer, "lightning": _lightning}[asked["contender"]]
    ends = run(model, tokens, asked["precision"], WARM + asked["steps"])
    seconds = [after - before for before, after in itertools.pairwise(ends)][WARM - 1 :]
    print(json.dumps(tokens.numel() / statistics.median(seconds)))


def _trainer(model, tokens, precision: str, steps: int) -> list[float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(tokens),
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens] * (steps + 1)
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    return ends


def _lightning(model, tokens, precision: str, steps: int) -> list[float]:
    import lightning
    import torch

    ends: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, _number: int):
            return self.model(input_ids=batch, labels=batch).loss

        def on_train_batch_end(self, *_args) -> None:
            ends.append(time.perf_counter())

        def configure_gradient_clipping(self, *_args, **_kwargs) -> None:
            # Lightning's own clipping refuses fused optimizers under autocast
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def configure_optimizers(self):
            return torch.optim.AdamW(
                self.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )

    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    batches = torch.utils.data.DataLoader([*tokens] * (steps + 1), batch_size=len(tokens))
    trainer.fit(Module().train(), batches)
    return ends


if __name__ == "__main__":
    main()
