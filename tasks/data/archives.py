"""A zip file read as a folder, in place; one that was made to do harm is refused by name.

Nothing is ever extracted: a member is decompressed into memory when it is read, no further than
the size that the archive declares for it, and the declared sizes have limits.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from tasks.errors import BadInput

MAX_MEMBERS = 1_000_000
MAX_MEMBER_BYTES = 320_000_000  # the largest image that is read, as an uncompressed bitmap
MAX_BYTES = 256 * 2**30  # of all members together
MAX_RATIO = 250  # plain bitmaps shrink a hundredfold, deflate's bombs a thousandfold
SMALL = 2**20  # below this, a ratio is no danger
ENCRYPTED = 0x41  # flag bits: with a password, or by the newer scheme
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile cannot read others piece by piece
NESTED = re.compile(r"(^|::)(zip|tar|libarchive)(::|://)")  # fsspec's own readers: no checks


class ZipFolder(AbstractFileSystem):
    """The members of a zip file as fsspec paths `<archive>/<member>`.

    Hidden members and `__MACOSX/` (which macOS adds) are not seen.
    """

    cachable = False  # another archive may lie at the same path tomorrow

    def __init__(self, path: Path) -> None:
        """Raises BadInput, with the archive's and the member's name, for what is not safe."""
        super().__init__()
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise BadInput(f"dataset.path: {path}: not a whole zip archive ({error})") from error
        members = self.zip.infolist()
        _refuse(path, members)
        seen = [m for m in members if not _unseen(m.filename)]
        self.members = {m.filename: m for m in seen if not m.is_dir()}
        given = {m.filename.rstrip("/") for m in seen if m.is_dir()}
        above = {str(p) for n in (*given, *self.members) for p in PurePosixPath(n).parents}
        self.folders = given | above | {"."}
        both = sorted(self.folders & set(self.members))
        if both:
            raise _bad(path, both[0], "is a file and a folder")

    @property
    def root(self) -> str:
        """The archive's path, with the folders that alone hold everything (`zip -r x.zip x`)."""
        inside = ""
        while True:
            entries = self.ls(f"{self.path}/{inside}")
            if len(entries) != 1 or entries[0]["type"] != "directory":
                return f"{self.path}/{inside}".rstrip("/")
            inside = self._member(entries[0]["name"]) + "/"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        here = self._member(path)
        if here in self.members:
            entries = [self._entry(here)]
        elif here not in self.folders:
            raise FileNotFoundError(path)
        else:
            entries = [self._entry(name) for name in self._children().get(here, [])]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        member = self._member(path)
        if member not in self.members and member not in self.folders:
            raise FileNotFoundError(path)
        return self._entry(member)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        """The whole member; raises BadInput where it is damaged or is not as long as it says."""
        member = self.members[self._member(path)]
        try:
            with self.zip.open(member) as file:
                content = file.read(member.file_size)  # never read(): that has no bound
                whole = not file.read(1) and len(content) == member.file_size
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise _bad(self.path, member.filename, f"damaged ({error})") from error
        if not whole:
            raise _bad(self.path, member.filename, f"not the {member.file_size:,} bytes it says")
        return content[start:end]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode != "rb":
            raise OSError(f"{self.path} is only read")
        return io.BytesIO(self.cat_file(path))

    def _children(self) -> dict[str, list[str]]:
        if not hasattr(self, "_kept"):
            self._kept: dict[str, list[str]] = {}
            for name in sorted({*self.members, *self.folders} - {"."}):
                self._kept.setdefault(str(PurePosixPath(name).parent), []).append(name)
        return self._kept

    def _entry(self, member: str) -> dict[str, Any]:
        name = str(self.path) if member == "." else f"{self.path}/{member}"
        if member in self.members:
            return {"name": name, "type": "file", "size": self.members[member].file_size}
        return {"name": name, "type": "directory", "size": 0}

    def _member(self, path: str) -> str:
        inside = str(path).rstrip("/")[len(str(self.path)) :].strip("/")
        return inside or "."


def open_archive(path: str) -> ZipFolder:
    """The archive at `path`; its directory is read once for as long as the file is the same."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"dataset.path: no file at {path}")
    state = file.stat()
    return _open(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _open(file: Path, *_: int) -> ZipFolder:
    return ZipFolder(file)


def is_archive(path: str) -> bool:
    """Whether a dataset's path is a zip file of this machine (not a folder of such a name)."""
    return "://" not in path and path.lower().endswith(".zip") and not Path(path).is_dir()


def refuse_nested(path: str) -> None:
    """BadInput for a URI that would open an archive with none of the checks made here."""
    if NESTED.search(path) or ("://" in path and path.lower().endswith(".zip")):
        raise BadInput(
            f"dataset.path: {path}: an archive is read from a zip file of this machine, named by "
            "its plain path"
        )


def unzipped(file: Path, limit: int) -> bytes:
    """The content of a `.gz` file; BadInput, with its name, where that is over `limit` bytes."""
    with gzip.open(file) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise BadInput(f"{file}: decompresses to more than {limit:,} bytes, a decompression bomb?")
    return content


def _refuse(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise BadInput(f"{path}: {len(members):,} members are over {MAX_MEMBERS:,}")
    names: set[str] = set()
    for member in members:
        for reason in _reasons(member):
            raise _bad(path, member.orig_filename, reason)
        if member.filename in names:
            raise _bad(path, member.filename, "stands twice")
        names.add(member.filename)
    total, packed = sum(m.file_size for m in members), path.stat().st_size
    if total > MAX_BYTES:
        raise BadInput(f"{path}: {total:,} bytes decompressed are over {MAX_BYTES:,}")
    if total > MAX_RATIO * max(packed, SMALL):  # members that share their compressed bytes
        raise BadInput(f"{path}: {packed:,} bytes become {total:,}, a decompression bomb")


def _reasons(member: zipfile.ZipInfo) -> Iterator[str]:
    """What is wrong with a member by what the archive says of it."""
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    parts = name.replace("\\", "/").removesuffix("/").split("/")
    if ".." in parts:
        yield "leads out of the archive"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        yield "is an absolute path"
    if "\\" in name or not name.isprintable() or not {"", "."}.isdisjoint(parts):
        yield "is not a plain name"
    if kind == stat.S_IFLNK:
        yield "is a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield "is neither file nor folder"
    if member.flag_bits & ENCRYPTED:
        yield "is encrypted"
    if member.compress_type not in METHODS:
        yield f"is compressed by method {member.compress_type}; use stored or deflated"
    if member.file_size > MAX_MEMBER_BYTES:
        yield f"{member.file_size:,} bytes decompressed are over {MAX_MEMBER_BYTES:,}"
    if member.file_size > max(MAX_RATIO * member.compress_size, SMALL):
        yield f"{member.compress_size:,} bytes become {member.file_size:,}, a decompression bomb"


def _unseen(name: str) -> bool:
    return any(p.startswith(".") for p in name.split("/")) or name.startswith("__MACOSX/")


def _bad(path: Path, member: str, reason: str) -> BadInput:
    shown = member if member.isprintable() else repr(member)
    return BadInput(f"{path}: {shown[:120]} ({reason})")
