"""Reading files: every hostile one is passed over with a reason, and what is read is described rightly."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from sihe.core.errors import NotFound
from sihe.data.text.documents import read_documents
from sihe.data.text.languages import natural_language
from sihe.data.text.licences import licence_in
from sihe.data.text.types import Document, Skipped


def write(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(*paths: Path, **options: object) -> tuple[dict[str, Document], dict[str, Skipped]]:
    found = list(read_documents(paths, **options))  # type: ignore[arg-type]
    documents = {item.path: item for item in found if isinstance(item, Document)}
    skipped = {item.path: item for item in found if isinstance(item, Skipped)}
    assert len(documents) + len(skipped) == len(found)
    return documents, skipped


def test_a_document_tells_what_it_is(tmp_path: Path) -> None:
    root = write(
        tmp_path / "code", pkg__mod_dot_py="x = 1\r\ny = 2\r", LICENSE="Apache License\nVersion 2.0, January 2004"
    )
    documents, skipped = read(root)
    found = documents["code/pkg/mod.py"]
    assert (found.text, found.kind, found.language, found.licence) == ("x = 1\ny = 2\n", "code", "python", "Apache-2.0")
    assert found.sha256 == hashlib.sha256(b"x = 1\ny = 2\n").hexdigest()
    assert skipped == {}


def test_the_order_is_that_of_the_names_whatever_the_disk_says(tmp_path: Path) -> None:
    write(tmp_path / "r", b_dot_py="b", a__z_dot_py="z", a_dot_py="a", c__a_dot_py="c")
    names = [item.path for item in read_documents([tmp_path / "r"])]
    assert names == ["r/a.py", "r/b.py", "r/a/z.py", "r/c/a.py"]


def test_what_cannot_be_read_is_skipped_with_its_reason(tmp_path: Path) -> None:
    root = write(
        tmp_path / "r",
        good_dot_txt="hello",
        bom_dot_txt=b"\xef\xbb\xbfhello",
        latin_dot_txt="Stra\xdfe".encode("latin-1"),
        utf16_dot_txt="hi".encode("utf-16"),
        binary_dot_py=b"print(1)\0\0",
        empty_dot_py=b"",
        blank_dot_py=b" \n\t\n",
        picture_dot_png=b"\x89PNG",
        big_dot_txt=b"x" * 2000,
    )
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.txt"))
    documents, skipped = read(root, max_bytes=1000)
    assert {name: document.text for name, document in documents.items()} == {
        "r/good.txt": "hello",
        "r/bom.txt": "hello",
    }
    assert {name.removeprefix("r/"): item.reason for name, item in skipped.items()} == {
        "latin.txt": "not UTF-8",
        "utf16.txt": "binary",
        "binary.py": "binary",
        "empty.py": "empty",
        "blank.py": "empty",
        "picture.png": "not a text format",
        "big.txt": "too large",
        "pipe.txt": "not a regular file",
        "socket.txt": "not a regular file",
    }
    assert skipped["r/latin.txt"].detail == "byte 0xdf at 4"


def test_links_are_not_followed(tmp_path: Path) -> None:
    root = write(tmp_path / "r", a_dot_py="a = 1")
    secret = write(tmp_path / "elsewhere", secret_dot_txt="secret") / "secret.txt"
    (root / "loop").symlink_to(root)
    (root / "out.txt").symlink_to(secret)
    (root / "broken.txt").symlink_to(tmp_path / "nothing")
    documents, skipped = read(root)
    assert list(documents) == ["r/a.py"]
    assert {item.reason for item in skipped.values()} == {"a link"}
    assert len(skipped) == 3


def test_a_file_that_vanishes_on_the_way(tmp_path: Path) -> None:
    root = write(tmp_path / "r", a_dot_py="a", b_dot_py="b", c__d_dot_py="d")
    walk = read_documents([root])
    assert next(walk).path == "r/a.py"
    (root / "b.py").unlink()
    (root / "c" / "d.py").unlink()
    (root / "c").rmdir()
    rest = list(walk)
    assert [(item.path, type(item)) for item in rest] == [("r/b.py", Skipped), ("r/c/", Skipped)]
    assert rest[0].detail == "No such file or directory"


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "r", a_dot_py="a", closed__b_dot_py="b")
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, skipped = read(root)
    assert list(documents) == ["r/a.py"]
    assert skipped["r/closed/"].reason == "unreadable"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = write(tmp_path / "r", a_dot_py="a")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.py")).write_bytes(b"b = 1")
    documents, _ = read(root)
    assert sorted(documents) == ["r/a.py", "r/caf\\xe9.py"]
    for name in documents:
        name.encode()


def test_exclusion_by_name_and_by_path(tmp_path: Path) -> None:
    root = write(
        tmp_path / "r",
        a_dot_py="a",
        tests__b_dot_py="b",
        sub__tests__c_dot_py="c",
        docs__d_dot_md="d",
        sub__e_dot_min_dot_js="e",
        _dot_git__f_dot_py="f",
    )
    documents, skipped = read(root, exclude=("tests", "docs/*.md", "*.min.js"))
    assert list(documents) == ["r/a.py"]
    assert set(skipped) == {"r/.git", "r/tests", "r/sub/tests", "r/docs/d.md", "r/sub/e.min.js"}


def test_roots_that_overlap_or_share_a_name(tmp_path: Path) -> None:
    write(tmp_path / "x" / "src", a_dot_py="a")
    write(tmp_path / "y" / "src", a_dot_py="b", sub__c_dot_py="c")
    documents, skipped = read(tmp_path / "x/src", tmp_path / "y/src", tmp_path / "y/src/sub", tmp_path / "x/src")
    assert sorted(documents) == ["x/src/a.py", "y/src/a.py", "y/src/sub/c.py"]
    assert {name: item.reason for name, item in skipped.items()} == {"sub/c.py": "read already"}


def test_a_single_file_and_a_missing_path(tmp_path: Path) -> None:
    write(tmp_path, notes_dot_md="# Notes")
    documents, _ = read(tmp_path / "notes.md")
    assert list(documents) == ["notes.md"]
    with pytest.raises(NotFound, match="nowhere"):
        list(read_documents([tmp_path / "notes.md", tmp_path / "nowhere"]))


# ---- licence and language -------------------------------------------------------------------------------------------

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
BSD = "Redistribution and use in source and binary forms, with or without modification"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("# SPDX-License-Identifier: MPL-2.0\n", "MPL-2.0"),
        ("/* SPDX-License-Identifier: (MIT OR Apache-2.0) */", "(MIT OR Apache-2.0) "),
        (f"# {MIT}", "MIT"),
        (" * Permission is hereby granted, free\n * of charge, to any person\n * obtaining a copy of", "MIT"),
        (f"{BSD}\nNeither the name of the copyright holder", "BSD-3-Clause"),
        (BSD, "BSD-2-Clause"),
        ("Licensed under the Apache License, Version 2.0 (the License);", "Apache-2.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE Version 2.1", "LGPL-2.1"),
        ("GNU GENERAL PUBLIC LICENSE\n Version 3", "GPL-3.0"),
        ("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2 … " + BSD, "PSF-2.0"),
        ("This code has a licence, somewhere.", "unknown"),
        ("x = 1", "unknown"),
        ("x = 1\n" * 2000 + MIT, "unknown"),
    ],
)
def test_licences_by_their_words(text: str, licence: str) -> None:
    assert licence_in(text) == licence.strip()


def test_the_nearest_licence_file_counts(tmp_path: Path) -> None:
    write(
        tmp_path / "repo",
        _dot_git__HEAD="ref",
        LICENSE=MIT,
        src__a_dot_py="a",
        src__vendored__COPYING_dot_txt=BSD,
        src__vendored__deep__b_dot_py="b",
        src__own_dot_py="# SPDX-License-Identifier: Apache-2.0\n",
    )
    documents, _ = read(tmp_path / "repo" / "src")
    licences = {name: document.licence for name, document in documents.items() if name.endswith(".py")}
    assert licences == {"src/a.py": "MIT", "src/vendored/deep/b.py": "BSD-2-Clause", "src/own.py": "Apache-2.0"}


def test_a_licence_above_the_root_counts_only_within_a_repository(tmp_path: Path) -> None:
    write(tmp_path, LICENSE=MIT, plain__src__a_dot_py="a")
    documents, _ = read(tmp_path / "plain" / "src")
    assert documents["src/a.py"].licence == "unknown"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cache holds keys and values of every layer.", "en"),
        ("张量并行把一层的权重切到多张卡上。", "zh"),
        ("用 AllReduce 同步梯度，NCCL 选择 ring 或 tree 算法。", "zh"),
        ("分散トレーニングとはモデルを複数のマシンで学習することです。", "other"),
        ("Тензорный параллелизм", "other"),
        ("123 456 !!", "other"),
    ],
)
def test_natural_languages_by_script(text: str, language: str) -> None:
    assert natural_language(text) == language
