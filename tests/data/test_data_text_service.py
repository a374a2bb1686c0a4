"""From files to a data set: the same input is the same data set, and a kill at any stage needs no repair."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sihe.core import settings, terminal
from sihe.core.errors import CorruptData, InvalidInput, NoSpace, NotFound
from sihe.core.workspace import Workspace
from sihe.data.commands import lake_app, text_app
from sihe.data.errors import EmptyCorpus
from sihe.data.lake import Lake
from sihe.data.loading import TokenDataset
from sihe.data.text import TextService, load_tokenizer
from sihe.data.text.types import STAGES, Progress

PACKAGE = Path(settings.__file__).parents[1]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Real source files, with a copy, a near copy, a bad file and a binary one added."""
    root = tmp_path / "corpus"
    shutil.copytree(PACKAGE / "core", root / "core", ignore=shutil.ignore_patterns("__pycache__"))
    errors = (root / "core" / "errors.py").read_text(encoding="utf-8")
    (root / "z_copy.py").write_text(errors.replace("    ", "\t").upper(), encoding="utf-8")
    (root / "z_near.py").write_text(errors + "\nEXTRA = 'one more line at the end of the file'\n", encoding="utf-8")
    (root / "z_long.py").write_text("data = '" + "x" * 5000 + "'\n", encoding="utf-8")
    (root / "z_binary.py").write_bytes(b"\0\1\2")
    return root


def prepare(workspace: Workspace, corpus: Path, **changes: object) -> object:
    options = {"vocab_size": 600, "held_out": 0.1, **changes}
    return TextService(workspace).prepare("toy", [corpus], **options)  # type: ignore[arg-type]


def test_files_become_a_data_set(workspace: Workspace, corpus: Path) -> None:
    told: list[Progress] = []
    made = prepare(workspace, corpus, on_progress=told.append)
    dataset = TokenDataset.open(made.folder)
    counts = made.counts
    assert counts["exact_duplicates"] == 1
    assert counts["near_duplicates"] == 1
    assert made.filtered["longest line"] == 1
    assert made.skipped["binary"] == 1
    dropped = counts["low_quality"] + counts["exact_duplicates"] + counts["near_duplicates"]
    assert counts["documents"] == counts["kept"] + dropped
    assert counts["kept"] == counts["train_documents"] + counts["held_out_documents"]
    assert counts["held_out_documents"] > 0
    for split in ("train", "held_out"):
        assert dataset.num_tokens(split) == counts[f"{split}_tokens"]
        assert (
            Counter(dataset.split(split).tokens(0, dataset.num_tokens(split)).tolist())[1]
            == counts[f"{split}_documents"]
        )
    assert dataset.vocab_size == 600
    assert [name for name in STAGES if name in made.seconds] == list(STAGES)
    assert {progress.stage for progress in told} == set(STAGES)
    assert workspace.tracking.ancestors(made.key) == [(made.key, f"table:documents@{made.table_version}")]


def test_the_tokens_are_the_documents(workspace: Workspace, corpus: Path) -> None:
    made = prepare(workspace, corpus)
    dataset, tokenizer = TokenDataset.open(made.folder), load_tokenizer(made.folder)
    tokens = dataset.split("train").tokens(0, dataset.num_tokens("train"))
    ends = np.flatnonzero(tokens == dataset.eos_token_id)
    texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, ends + 1)[:-1] for part in [part[:-1]]]
    rows = pq.read_table(made.folder / "documents.parquet").to_pylist()
    expected = [row["path"] for row in rows if row["split"] == "train"]
    assert len(texts) == len(expected) > 3
    for path, text in zip(expected, texts, strict=True):
        assert text == (corpus.parent / path).read_text(encoding="utf-8")


def test_every_document_has_a_fate_and_every_duplicate_a_twin_that_stays(workspace: Workspace, corpus: Path) -> None:
    made = prepare(workspace, corpus)
    rows = {row["path"]: row for row in pq.read_table(made.folder / "documents.parquet").to_pylist()}
    assert len(rows) == made.counts["documents"]
    assert (rows["corpus/z_copy.py"]["fate"], rows["corpus/z_copy.py"]["twin"]) == (
        "exact duplicate",
        "corpus/core/errors.py",
    )
    near = rows["corpus/z_near.py"]
    assert (near["fate"], near["twin"]) == ("near duplicate", "corpus/core/errors.py")
    assert near["value"] >= 0.8
    assert rows["corpus/core/errors.py"]["fate"] == "kept"
    assert rows["corpus/z_long.py"]["rule"] == "longest line"


def test_the_same_input_is_the_same_data_set(workspace: Workspace, corpus: Path) -> None:
    first = prepare(workspace, corpus)
    again = prepare(workspace, corpus)
    assert (first.is_reused, again.is_reused) == (False, True)
    assert (again.key, again.folder, again.counts) == (first.key, first.folder, first.counts)
    assert Lake(workspace.path("lake")).table("documents").version == first.table_version


def test_another_home_gives_the_same_bytes(workspace: Workspace, corpus: Path, tmp_path: Path) -> None:
    first = prepare(workspace, corpus)
    with Workspace(settings.load({"home": str(tmp_path / "other")}, environ={}, directory=tmp_path)) as other:
        second = prepare(other, corpus)
    assert second.version == first.version
    for name in ("train-00000.bin", "held_out-00000.bin", "tokenizer.json", "documents.parquet"):
        assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes()


def test_changes_make_a_new_version_and_leave_the_old_one(workspace: Workspace, corpus: Path) -> None:
    made = [
        prepare(workspace, corpus),
        prepare(workspace, corpus, vocab_size=500),
        prepare(workspace, corpus, held_out=0.2),
    ]
    (corpus / "core" / "clock.py").write_text((corpus / "core" / "ids.py").read_text() + "\n# changed\n")
    made.append(prepare(workspace, corpus))
    assert len({item.version for item in made}) == 4
    assert [item.table_version for item in made] == [0, 0, 0, 1]
    service = TextService(workspace)
    assert {manifest.version for manifest in service.versions("toy")} == {item.version for item in made}
    assert service.open("toy").folder == made[-1].folder
    assert service.open(f"toy@{made[0].version}").folder == made[0].folder
    assert service.names() == ["toy"]


def test_what_is_not_there_is_named(workspace: Workspace, corpus: Path) -> None:
    service = TextService(workspace)
    with pytest.raises(NotFound, match="sihe text prepare"):
        service.open("toy")
    made = prepare(workspace, corpus)
    with pytest.raises(NotFound, match="there are: toy"):
        service.open("other")
    with pytest.raises(NotFound, match=f"versions {made.version}"):
        service.open("toy@0123")
    with pytest.raises(NotFound, match="nowhere"):
        prepare(workspace, corpus / "nowhere")


@pytest.mark.parametrize("wrong", [{"vocab_size": 100}, {"held_out": 0.9}, {"near_threshold": 0.1}])
def test_wrong_settings_are_refused_before_the_work(
    workspace: Workspace, corpus: Path, wrong: dict[str, float]
) -> None:
    with pytest.raises(InvalidInput):
        prepare(workspace, corpus, **wrong)
    assert not workspace.path("lake").exists()


def test_nothing_left_to_learn_from(workspace: Workspace, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EmptyCorpus, match="no files"):
        prepare(workspace, empty)
    (empty / "a.bin").write_bytes(b"x")
    with pytest.raises(EmptyCorpus, match="1 not a text format"):
        prepare(workspace, empty)
    (empty / "short.py").write_text("x = 1\n")
    with pytest.raises(EmptyCorpus, match="1 by 'characters'"):
        prepare(workspace, empty)


def test_one_document_is_trained_on(workspace: Workspace, tmp_path: Path) -> None:
    only = tmp_path / "only.py"
    shutil.copy(PACKAGE / "core" / "errors.py", only)
    made = prepare(workspace, only)
    assert (made.counts["train_documents"], made.counts["held_out_documents"]) == (1, 0)


def test_a_damaged_data_set_is_not_reused_in_silence(workspace: Workspace, corpus: Path) -> None:
    made = prepare(workspace, corpus)
    shard = made.folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptData, match=r"train-00000\.bin.*prepare it again"):
        prepare(workspace, corpus)
    shutil.rmtree(made.folder)
    repaired = prepare(workspace, corpus)
    assert (repaired.is_reused, repaired.key, repaired.table_version) == (False, made.key, made.table_version)


# ---- killed, and out of space ---------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.data.text import TextService
stage = sys.argv[3]
if stage == "link":
    from sihe.core.tracking import Tracking
    Tracking.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def die(progress):
    if progress.stage == stage and (stage != "pack" or progress.done):
        os.kill(os.getpid(), signal.SIGKILL)
with Workspace(settings.load({"home": sys.argv[1]}, environ={})) as workspace:
    TextService(workspace).prepare("toy", [sys.argv[2]], vocab_size=600, held_out=0.1, on_progress=die)
"""


@pytest.mark.parametrize("stage", [*STAGES, "link"])
def test_killed_at_any_stage_the_next_call_finishes(workspace: Workspace, corpus: Path, stage: str) -> None:
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, str(workspace.home), str(corpus), stage], check=False, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert bool(TextService(workspace).names()) == (stage == "link")
    made = prepare(workspace, corpus)
    assert made.is_reused == (stage == "link")
    assert made.table_version == 0
    assert Lake(workspace.path("lake")).table("documents").version == 0
    assert workspace.tracking.ancestors(made.key) == [(made.key, "table:documents@0")]
    assert not [path for path in made.folder.parent.iterdir() if ".tmp-" in path.name]


def test_two_at_once_make_one(workspace: Workspace, corpus: Path) -> None:
    code = _KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "None")
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(workspace.home), str(corpus), "none"], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        assert process.wait(timeout=120) == 0, process.stderr.read().decode() if process.stderr else ""
        if process.stderr:
            process.stderr.close()
    assert len(TextService(workspace).versions("toy")) == 1
    assert Lake(workspace.path("lake")).table("documents").version == 0


@pytest.fixture
def small_home(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("free_bytes", [2_000, 60_000])
def test_a_full_disk_loses_nothing(small_home: Path, corpus: Path, tmp_path: Path, free_bytes: int) -> None:
    with Workspace(settings.load({"home": str(small_home)}, environ={}, directory=tmp_path)) as workspace:
        workspace.tracking.link("a", ["b"])  # the databases exist before the disk is full
        state = os.statvfs(small_home)
        filler = small_home / "filler"
        filler.write_bytes(bytes(state.f_bavail * state.f_frsize - free_bytes))
        with pytest.raises(NoSpace, match="run the same command again"):
            prepare(workspace, corpus)
        assert TextService(workspace).names() == []
        filler.unlink()
        assert prepare(workspace, corpus).counts["kept"] > 3


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(workspace: Workspace) -> Iterator[CliRunner]:
    terminal.set_flags({"home": str(workspace.home)})
    yield CliRunner()
    terminal.set_flags({})


def test_the_commands_speak_json(cli: CliRunner, corpus: Path, tmp_path: Path) -> None:
    def run(app: object, *arguments: str) -> object:
        result = cli.invoke(app, [*arguments, "--json"])  # type: ignore[arg-type]
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run(text_app, "list") == []
    made = run(text_app, "prepare", "toy", str(corpus), "--vocab-size", "500", "--exclude", "records")
    assert made["is_reused"] is False
    (listed,) = run(text_app, "list")
    assert made["dataset"] == f"dataset:{listed['dataset']}"
    shown = run(text_app, "show", "toy")
    assert shown["vocab_size"] == 500
    dropped = run(text_app, "show", "toy", "--dropped")
    assert {row["path"] for row in dropped} >= {"corpus/z_copy.py", "corpus/z_near.py", "corpus/z_long.py"}
    assert run(lake_app, "list") == [{"table": "documents", "version": 0}]
    assert run(lake_app, "show", "documents")[0]["rows_added"] == made["counts"]["documents"]
    rows = run(lake_app, "read", "documents", "--as-of", "0", "--column", "path", "--where", "path LIKE '%z_near%'")
    assert rows == [{"path": "corpus/z_near.py"}]
    (tmp_path / "rows.csv").write_text("number,text\n1,one\n2,two\n")
    assert run(lake_app, "append", "numbers", str(tmp_path / "rows.csv")) == {
        "table": "numbers",
        "version": 0,
        "rows": 2,
    }


def test_the_commands_speak_to_people(cli: CliRunner, corpus: Path) -> None:
    assert cli.invoke(text_app, ["prepare", "toy", str(corpus), "--vocab-size", "500"]).exit_code == 0
    shown = cli.invoke(lake_app, ["read", "documents", "--limit", "2", "--column", "path"]).stdout
    assert "corpus/core" in shown
    assert "more rows" in shown
    assert "toy@" in cli.invoke(text_app, ["list"]).stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["read", "nothing"], NotFound),
        (["show", "nothing"], NotFound),
        (["append", "t", "rows.xyz"], InvalidInput),
        (["append", "t", "rows.csv"], NotFound),
    ],
)
def test_the_commands_refuse_clearly(cli: CliRunner, arguments: list[str], error: type[Exception]) -> None:
    assert isinstance(cli.invoke(lake_app, arguments).exception, error)
