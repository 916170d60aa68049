"""Downloads against a local server: resume, size, changed files, errors, progress."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from r2ec_fast.data.prepare import prepare_amazon
from r2ec_fast.data.sources.amazon import amazon_urls
from r2ec_fast.data.sources.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; `server.cuts` lists how many bytes the next answers send at most."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.server
        server.seen.append((self.command, self.headers.get("Range")))
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        content = server.files.get(self.path, server.content)
        if content is None:
            self.send_error(404)
            return
        begin = 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == server.tag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
        else:
            self.send_response(200)
        length = len(content) - begin + server.lie
        self.send_header("Content-Length", str(length))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        if body:
            cut = server.cuts.pop(0) if server.cuts else None
            self.wfile.write(content[begin:][:cut])

    def log_message(self, *_args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.files, server.tag = CONTENT, {}, '"one"'
        server.cuts, server.errors, server.seen = [], [], []
        server.ranges, server.lie = True, 0
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/file.bin"
        yield server
        server.shutdown()
        thread.join()


def fetch(server, tmp_path: Path, **kwargs) -> Path:
    kwargs = {"progress": False, "wait": lambda _seconds: None, **kwargs}
    return download(server.url, tmp_path / "sub" / "file.bin", **kwargs)


def test_whole_file_and_nothing_else(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_a_broken_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [300_000, 200_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    ranges = [wanted for _, wanted in server.seen]
    assert ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_the_next_run_goes_on_too(server, tmp_path):
    server.cuts = [300_000]
    with pytest.raises(OSError, match=r"after 1 tries.*go on from 300,000 bytes"):
        fetch(server, tmp_path, retries=0)
    assert not (tmp_path / "sub" / "file.bin").exists()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.seen[-1] == ("GET", "bytes=300000-")


def test_a_changed_file_is_fetched_from_the_start(server, tmp_path):
    server.cuts = [300_000]
    with pytest.raises(OSError, match="cannot fetch"):
        fetch(server, tmp_path, retries=0)
    server.content, server.tag = CONTENT[::-1], '"two"'
    assert fetch(server, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("how", ["no ranges", "no tag"])
def test_servers_that_cannot_resume(server, tmp_path, how):
    server.cuts = [300_000]
    server.ranges = how != "no ranges"
    server.tag = None if how == "no tag" else '"one"'
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_complete_part_is_only_renamed(server, tmp_path):
    part = tmp_path / "sub" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    (tmp_path / "sub" / "file.bin.part.tag").write_text('"one"')
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.seen) == 1


def test_a_file_with_the_servers_size_is_kept(server, tmp_path):
    path = fetch(server, tmp_path)
    server.seen.clear()
    assert fetch(server, tmp_path) == path
    assert server.seen == [("HEAD", None)]
    path.write_bytes(CONTENT[:-1])
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_an_offline_run_uses_the_file_that_is_there(server, tmp_path):
    path = fetch(server, tmp_path)
    server.errors = [503]
    assert fetch(server, tmp_path) == path


def test_errors(server, tmp_path):
    server.errors = [404]
    with pytest.raises(OSError, match=r"file\.bin answered 404"):
        fetch(server, tmp_path)
    server.errors = [503, 500]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    server.lie = 5  # a server that promises more than it has
    server.tag = None
    with pytest.raises(OSError, match="closed at 1,048,576 of 1,048,581"):
        download(server.url, tmp_path / "b.bin", progress=False, retries=1, wait=lambda _s: None)


def test_progress_goes_to_stderr(server, tmp_path, capsys):
    fetch(server, tmp_path, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "file.bin" in captured.err


def test_waits_double(server, tmp_path):
    waits = []
    server.errors = [500, 500, 500]
    fetch(server, tmp_path, wait=waits.append)
    assert waits == [1.0, 2.0, 4.0]


def test_addresses():
    reviews, metadata = amazon_urls("Video_Games", "http://x/")
    assert reviews == "http://x/benchmark/5core/rating_only/Video_Games.csv.gz"
    assert metadata == "http://x/raw/meta_categories/meta_Video_Games.jsonl.gz"


def test_prepare_downloads_what_is_missing(server, tmp_path, generate_amazon):
    reviews, metadata = generate_amazon(tmp_path / "raw", reviews=2_000, kind="csv")
    base = server.url.rsplit("/", 1)[0]
    urls = amazon_urls("Musical_Instruments", base)
    server.files = {
        urls[0].removeprefix(base): reviews.read_bytes(),
        urls[1].removeprefix(base): metadata.read_bytes(),
    }
    done = prepare_amazon(
        str(tmp_path / "set"),
        base_url=base,
        download_dir=str(tmp_path / "downloads"),
        min_items=0,
        progress=False,
    )
    assert done.dataset.data.num_events > 0
    assert sorted(p.name for p in (tmp_path / "downloads").iterdir()) == [
        "Musical_Instruments.csv.gz",
        "meta_Musical_Instruments.jsonl.gz",
    ]
