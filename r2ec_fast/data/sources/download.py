"""Downloads that resume, show progress, and are checked for their size."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from r2ec_fast.data.progress import byte_bar
from r2ec_fast.data.store import write_errors

CHUNK = 1 << 20
RETRIES = 5
TIMEOUT = 60.0
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def download(
    url: str,
    path: str | Path,
    *,
    progress: bool = True,
    retries: int = RETRIES,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch `url` to `path`; a file that is already there with the server's size is kept.

    Bytes go to `path` + ".part" and are renamed when complete. A broken transfer, also of an
    earlier run, goes on where it stopped if the server's file is still the same (its ETag or date).

    Args:
        url: http(s) address.
        path: the file to write; its directory is created.
        progress: show a bar on stderr.
        retries: how often a broken transfer is taken up again, after 1, 2, 4, ... seconds.
        wait: sleeps; tests replace it.

    Raises:
        OSError: the server refuses, the transfer stays broken, the size differs from the server's,
            or the disk is full. The partial file stays for the next run.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.exists():
        size = _remote_size(url)
        if size in (None, path.stat().st_size):
            return path
        path.unlink()
    bar = byte_bar(progress)
    with bar, write_errors(part):
        task = bar.add_task(path.name, total=None)
        for attempt in range(retries + 1):
            try:
                total = _transfer(
                    url, part, lambda done, all_: bar.update(task, completed=done, total=all_)
                )
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == retries:
                    raise OSError(f"url: {url} answered {error.code} {error.reason}") from error
            except _BROKEN as error:
                if attempt == retries:
                    raise OSError(
                        f"url: cannot fetch {url} after {retries + 1} tries: {error}; "
                        f"run again to go on from {_size(part):,} bytes"
                    ) from error
            wait(2.0**attempt)
    size = _size(part)
    if total is not None and size != total:
        part.unlink()
        raise OSError(f"url: {url} should have {total:,} bytes, got {size:,}; the file was removed")
    os.replace(part, path)
    _mark(part).unlink(missing_ok=True)
    return path


def _transfer(url: str, part: Path, show: Callable[[int, int | None], None]) -> int | None:
    """Append to `part` until the server's end; returns the total size if the server says it."""
    have, mark = _size(part), _mark(part)
    request = urllib.request.Request(url, headers={"User-Agent": "r2ec-fast"})
    if have and mark.exists():
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after `have`: it is complete, or of another file
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if whole == str(have):
                return have
            part.unlink()
        raise
    with answer:
        resumed = answer.status == 206
        if not resumed:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            mark.write_text(tag)
        else:
            mark.unlink(missing_ok=True)
        show(have, total)
        with open(part, "ab" if resumed else "wb") as file:
            while piece := answer.read(CHUNK):
                file.write(piece)
                have += len(piece)
                show(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection closed at {have:,} of {total:,} bytes")
    return total


def _remote_size(url: str) -> int | None:
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "r2ec-fast"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
    except _BROKEN:
        return None  # offline: the file that is here is used
    return None if length is None else int(length)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _mark(part: Path) -> Path:
    return part.with_name(part.name + ".tag")
