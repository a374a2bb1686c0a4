"""`transformers`: a plain `generate`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run


def load(folder: Path, precision: str, _context: int) -> Generate:
    """A model of the precision with its default (SDPA) attention."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision)).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [list(row) for row in whole[:, ids.shape[1] :].tolist()]

    return generate


if __name__ == "__main__":
    run(load)
