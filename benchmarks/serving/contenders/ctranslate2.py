"""CTranslate2: its generator, all prompts in one batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run


def convert(folder: Path, precision: str) -> Path:
    """The model in CTranslate2's own format, beside the original; made once."""
    import ctranslate2

    target = folder.parent / f"ctranslate2-{precision}"
    if not (target / "model.bin").exists():
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.convert(str(target), quantization=precision, force=True)
        settings = json.loads((target / "config.json").read_text())
        settings |= {name: "!" for name, value in settings.items() if value is None and name.endswith("_token")}
        (target / "config.json").write_text(json.dumps(settings))  # it does not load a model without these
    return target


def load(folder: Path, precision: str, _context: int) -> Generate:
    """A generator of the precision."""
    import ctranslate2

    threads = int(os.environ["OMP_NUM_THREADS"])
    generator = ctranslate2.Generator(
        str(convert(folder, precision)), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
    )
    words = json.loads((folder.parent / f"ctranslate2-{precision}" / "vocabulary.json").read_text())

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_batch_size=0,
            batch_type="examples",
            beam_size=1,
            sampling_topk=1,
            max_length=tokens,
            min_length=tokens,
            end_token=[],
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    run(load)
