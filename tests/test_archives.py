"""Zip files are read in place; hostile archives and images are refused by name."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import prepare
from tasks.data import archives, sources
from tasks.data.config import DatasetConfig
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import override_params
from tests.test_data import contents, folder, idx, image_folder
from tests.test_pairs import noise, pairs, save


def png(size: int = 8, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def good(path: Path) -> Path:
    """A hundred images of two classes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(100):
            archive.writestr(f"{'cats' if i % 2 else 'dogs'}/{i}.png", png(seed=i))
    return path


def add(path: Path, name: str, content: bytes = b"x", **attributes: int) -> None:
    info = zipfile.ZipInfo(name)
    info.compress_type = attributes.pop("method", zipfile.ZIP_DEFLATED)
    for key, value in attributes.items():
        setattr(info, key, value)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, content)


def rewrite(path: Path, name: str, offset: int, layout: str, value: int) -> None:
    """Change a field of a member's entry in the archive's directory."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode()) - 46  # the last mention stands in the directory
    assert data[at : at + 4] == b"PK\x01\x02"
    struct.pack_into(layout, data, at + offset, value)
    path.write_bytes(data)


def test_a_zip_is_the_folder_it_was_made_of(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (source / "cats" / ".DS_Store").write_bytes(b"hidden")
    shutil.make_archive(str(tmp_path / "My Pets"), "zip", source)
    inside = tmp_path / "one more level.zip"
    shutil.make_archive(str(inside.with_suffix("")), "zip", source.parent, source.name)
    add(inside, "__MACOSX/", b"")
    add(inside, "__MACOSX/source/cats/._001.png")
    archive = image_folder(tmp_path / "My Pets.zip")
    prepare.run(image_folder(source), tmp_path / "a")
    prepare.run(archive, tmp_path / "b")
    prepare.run(image_folder(inside), tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert archive.title == "my-pets"
    assert {p.name for p in tmp_path.iterdir()} == {"source", archive.path.split("/")[-1],
                                                    inside.name, "a", "b", "c"}  # fmt: skip


def test_pairs_captions_and_attributes_come_from_a_zip_too(tmp_path: Path) -> None:
    for i, image in enumerate(noise()):
        save(tmp_path / "two/target" / f"{i:02d}.png", image)
        save(tmp_path / "two/source" / f"{i:02d}.png", 255 - image)
    shutil.make_archive(str(tmp_path / "two"), "zip", tmp_path / "two")
    prepare.run(pairs(tmp_path / "two"), tmp_path / "a")
    prepare.run(pairs(tmp_path / "two.zip"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    flat = tmp_path / "flat"
    for i, image in enumerate(noise()):
        save(flat / f"{i}.png", image)
    (flat / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{i}.png,a\n" for i in range(90))
    )
    (flat / "attributes.csv").write_text("file,odd\n" + "".join(f"{i}.png,1\n" for i in range(90)))
    shutil.make_archive(str(flat), "zip", flat)
    manifest = prepare.run(image_folder(tmp_path / "flat.zip"), tmp_path / "c")
    assert manifest["spec"]["attributes"] == ["odd"]
    assert manifest["spec"]["text_length"] > 0


def test_the_outline_looks_into_a_zip(tmp_path: Path) -> None:
    assert image_folder(good(tmp_path / "classes.zip")).outline().classes
    plain = tmp_path / "plain.zip"
    add(plain, "1.png", png())
    add(plain, "2.png", png())
    assert not image_folder(plain).outline().classes
    assert not image_folder(plain).outline().text_length
    add(plain, "captions.csv", b"file,caption\n")
    assert image_folder(plain).outline().text_length


FLAT = bytes(3_000_000)  # deflates a thousandfold
UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent": (lambda p: add(p, "cats/../../evil.png"), "leads out"),
    "windows parent": (lambda p: add(p, "cats\\..\\evil.png"), "leads out"),
    "absolute": (lambda p: add(p, "/evil.png"), "absolute"),
    "drive": (lambda p: add(p, "C:evil.png"), "absolute"),
    "backslash": (lambda p: add(p, "cats\\evil.png"), "not a plain name"),
    "empty part": (lambda p: add(p, "cats//evil.png"), "not a plain name"),
    "newline": (lambda p: add(p, "cats/evil\n.png"), "not a plain name"),
    "twice": (lambda p: add(p, "cats/1.png"), "stands twice"),
    "file as folder": (lambda p: add(p, "cats/1.png/evil.png"), "a file and a folder"),
    "link": (
        lambda p: add(
            p, "cats/evil.png", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16
        ),
        "symbolic link",
    ),
    "pipe": (lambda p: add(p, "cats/evil.png", external_attr=stat.S_IFIFO << 16), "neither file"),
    "encrypted": (
        lambda p: (add(p, "cats/evil.png"), rewrite(p, "cats/evil.png", 8, "<H", 1))[0],
        "encrypted",
    ),
    "bzip2": (lambda p: add(p, "cats/evil.png", method=zipfile.ZIP_BZIP2), "method 12"),
    "bomb": (lambda p: add(p, "cats/evil.png", FLAT), "a decompression bomb"),
    "huge": (
        lambda p: (add(p, "cats/evil.png"), rewrite(p, "cats/evil.png", 24, "<I", 2**32 - 2))[0],
        "4,294,967,294 bytes decompressed are over",
    ),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_is_unsafe_is_refused_by_name_before_a_byte_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = UNSAFE[kind]
    path = good(tmp_path / "bad.zip")
    if kind == "twice":
        with pytest.warns(UserWarning, match="Duplicate"):
            make(path)
    else:
        make(path)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("a member was read"))
    for skip_bad in (False, True):  # hostile, not merely bad: never skipped
        with pytest.raises(BadInput) as caught:
            prepare.run(image_folder(path, skip_bad=skip_bad), tmp_path / "out")
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        assert ("cats/1.png" if kind in ("twice", "file as folder") else "evil") in message
        assert reason in message
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


def test_limits_of_the_whole_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = good(tmp_path / "x.zip")
    for name, value, words in (
        ("MAX_MEMBERS", 99, "100 members are over 99"),
        ("MAX_BYTES", 500, "bytes decompressed are over 500"),
        ("SMALL", 0, "a decompression bomb"),  # with MAX_RATIO 0: any size is too much
    ):
        with monkeypatch.context() as limits:
            limits.setattr(archives, name, value)
            if name == "SMALL":
                limits.setattr(archives, "MAX_RATIO", 0)
                limits.setattr(archives, "_reasons", lambda member: [])
            with pytest.raises(BadInput, match=words):
                archives.ZipFolder(path)
    archives.ZipFolder(path)


def test_members_that_lie_about_their_size_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared 100 bytes, 200 MB in truth: no more than the 100 are ever asked of zlib."""
    path = good(tmp_path / "x.zip")
    add(path, "cats/liar.png", bytes(200_000_000))
    rewrite(path, "cats/liar.png", 24, "<I", 100)
    asked = []
    real = zlib.decompressobj

    def watched(*words: int) -> object:
        inner = real(*words)

        class Watched:
            eof = property(lambda self: inner.eof)
            unconsumed_tail = property(lambda self: inner.unconsumed_tail)

            def decompress(self, data: bytes, limit: int = 0) -> bytes:
                out = inner.decompress(data, limit)
                asked.append(len(out))
                return out

            def flush(self) -> bytes:
                return inner.flush()

        return Watched()

    monkeypatch.setattr(zlib, "decompressobj", watched)
    with pytest.raises(BadInput, match=r"cats/liar\.png \(cannot be read: .*damaged \(Bad CRC"):
        prepare.run(image_folder(path), tmp_path / "out")
    assert max(asked) <= 4096


def test_damaged_archives_and_members_are_named(tmp_path: Path) -> None:
    path = good(tmp_path / "x.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"x\.zip: not a whole zip archive"):
        prepare.run(image_folder(path), tmp_path / "out")
    spoilt = bytearray(whole)
    at = whole.index(b"cats/1.png") + 30
    spoilt[at : at + 8] = bytes(8)
    path.write_bytes(spoilt)
    with pytest.raises(BadInput, match=r"1 bad: cats/1\.png \(cannot be read: .*damaged"):
        prepare.run(image_folder(path), tmp_path / "out")
    path.write_bytes(whole)
    add(path, "cats/nested.zip", whole)
    with pytest.raises(BadInput, match=r"1 bad: cats/nested\.zip \(not an image"):
        prepare.run(image_folder(path), tmp_path / "out")
    kept = prepare.run(image_folder(path, skip_bad=True), tmp_path / "out")
    assert [s["file"] for s in kept["skipped"]] == ["cats/nested.zip"]
    with pytest.raises(BadInput, match="no file at"):
        prepare.run(image_folder(tmp_path / "none.zip"), tmp_path / "out")


@pytest.mark.parametrize("uri", ["zip://::{}", "zip://cats::file://{}", "file://{}.zip"])
def test_no_uri_opens_an_archive_without_these_checks(tmp_path: Path, uri: str) -> None:
    good(tmp_path / "pets.zip")
    good(tmp_path / "pets")  # whatever its name
    config = DatasetConfig(name="image_folder", path=uri.format(tmp_path / "pets"))
    with pytest.raises(BadInput, match="named by its plain path"):
        prepare.run(config, tmp_path / "out")


def test_it_is_one_line_and_exit_code_2_before_anything_is_written(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(root / "params.yaml", params)
    path = good(tmp_path / "bad.zip")
    add(path, "../evil.png")
    changes = {"dataset.name": "image_folder", "dataset.path": str(path)}
    with pytest.raises(SystemExit) as ended, exit_on_bad_input("genarena"):
        override_params(changes, params)
    assert ended.value.code == 2
    line = f"genarena: {path}: ../evil.png (leads out of the archive)\n"
    assert capsys.readouterr().err == line
    assert params.read_bytes() == (root / "params.yaml").read_bytes()


def test_gzip_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((40, 28, 28), np.uint8)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx(array)))
    monkeypatch.setattr(sources, "MAX_IDX", 16 + array.size)
    assert sources._read_idx(file).shape == array.shape
    file.write_bytes(gzip.compress(idx(array) + b"x"))
    with pytest.raises(BadInput, match=r"ubyte\.gz: decompresses to more than 31,376 bytes"):
        sources._read_idx(file)
    file = tmp_path / "binarized_mnist_train.amat.gz"
    file.write_bytes(gzip.compress(b"0 " * 784 + b"\n"))
    monkeypatch.setattr(sources, "MAX_AMAT", 2 * 784)
    with pytest.raises(BadInput, match=r"amat\.gz: decompresses to more than 1,568 bytes"):
        sources._read_amat(file)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def icon(image: bytes) -> bytes:
    """An icon that says it is 16x16 and holds another image."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + image


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pixels.png", "is over 64,000,000 pixels"),
        ("text.png", "cannot be read"),
        ("profile.png", "cannot be read"),
        ("within.ico", "is over"),
        ("drawing.eps", "not an image"),
    ],
)
def test_image_bombs_are_bad_files(tmp_path: Path, name: str, reason: str) -> None:
    """Sizes in the header, text and colour profiles that inflate, images in images, PostScript."""
    header, start, rest = png()[:8], png()[8:33], png()[33:]
    wide = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0))
    huge = header + wide + rest
    bombs = {
        "pixels.png": huge,
        "text.png": header + start + chunk(b"zTXt", b"a\0\0" + zlib.compress(FLAT)) + rest,
        "profile.png": header + start + chunk(b"iCCP", b"a\0\0" + zlib.compress(FLAT)) + rest,
        "within.ico": icon(huge),
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    }
    source = folder(tmp_path / "source", n=6)
    (source / "cats" / name).write_bytes(bombs[name])
    with pytest.raises(BadInput, match=rf"1 bad: cats/{name} \({reason}"):
        prepare.run(image_folder(source), tmp_path / "out")
