"""llama.cpp through `llama-cpp-python`: its C interface, which alone decodes several sequences in one batch.

Greedy by NumPy's argmax over the logits of each sequence, which is what costs least here.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.serving.contenders.worker import Generate, Prompts, run

PRECISIONS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
SEQUENCES = 32


def convert(folder: Path, precision: str) -> Path:
    """The model as a GGUF file of the precision, beside the original; made once."""
    import llama_cpp

    from benchmarks.serving.contenders.gguf_file import write_gguf

    kind = PRECISIONS[precision]
    plain, target = (folder.parent / f"{name}.gguf" for name in ("F32", kind))
    if not plain.exists():
        write_gguf(folder, plain)
    if not target.exists():
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        wanted.nthread = int(os.environ["OMP_NUM_THREADS"])
        wanted.pure = True  # the head too in this precision, as everyone else's
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), wanted):
            raise RuntimeError(f"llama.cpp could not write {target}")
    return target


def load(folder: Path, precision: str, context: int, *, flash: bool = False) -> Generate:
    """A context for `SEQUENCES` sequences of `context` positions each."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    path = convert(folder, precision)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = SEQUENCES * context
    settings.n_seq_max = SEQUENCES
    settings.n_batch = 2048
    settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    settings.kv_unified = False  # a stream of its own for each sequence: faster where no prefix is shared
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else 0
    handle = llama_cpp.llama_init_from_model(model, settings)
    if not handle:
        raise RuntimeError("llama.cpp made no context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def step(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of (token, position, sequence, whether its answer is wanted); the tokens that follow those wanted."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        code = llama_cpp.llama_decode(handle, batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")
        chosen = []
        for at, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(handle, at), shape=(vocabulary,))
                chosen.append(int(logits.argmax()))
        return chosen

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
        length = len(prompts[0])
        rows = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        firsts: list[int] = []
        for start in range(0, len(rows), settings.n_batch):
            firsts += step(rows[start : start + settings.n_batch])
        answers = [[token] for token in firsts]
        for position in range(length, length + tokens - 1):
            rows = [(answer[-1], position, sequence, True) for sequence, answer in enumerate(answers)]
            for answer, token in zip(answers, step(rows), strict=True):
                answer.append(token)
        return answers

    return generate


if __name__ == "__main__":
    run(load)
