"""A web server on this machine that serves the files of a folder, and fails as asked."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Fault:
    """Of one GET request of a file."""

    status: int = 0  # answered in place of the file; 0: the file
    retry_after: str | None = None
    break_after: int | None = None  # bytes, then the connection is closed
    short: int | None = None  # bytes of the answer, which states that there are no more
    delay: float = 0.0  # seconds, before the answer


class ShardServer(ThreadingHTTPServer):
    """
    Attributes:
        faults: by file name, of the next requests of the file.
        ranges: whether parts of files are served.
        asked: (file name, first byte) of each GET request.
        sent: by file name, bytes that were sent.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.ranges = True
        self.asked: list[tuple[str, int]] = []
        self.sent: dict[str, int] = {}
        self.lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


@contextmanager
def serve_shards(folder: Path) -> Iterator[ShardServer]:
    server = ShardServer(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Answers(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        is_get = self.command == "GET"
        path = self.server.folder / name
        content = path.read_bytes() if path.is_file() else None
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        start = int(given[1]) if given else 0
        fault = Fault()
        if is_get:
            with self.server.lock:
                self.server.asked.append((name, start))
                if self.server.faults.get(name):
                    fault = self.server.faults[name].pop(0)
        time.sleep(fault.delay)
        if content is None or fault.status:
            self._answer(fault.status or 404, {"Retry-After": fault.retry_after} if fault.retry_after else {}, b"")
            return
        headers = {"Accept-Ranges": "bytes" if self.server.ranges else "none", "ETag": f'"{path.stat().st_mtime_ns}"'}
        part = content
        if given:
            stop = min(int(given[2]) + 1, len(content)) if given[2] else len(content)
            part = content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        part = part[: fault.short]
        self._answer(206 if given else 200, headers, part, fault.break_after)
        if is_get:
            with self.server.lock:
                self.server.sent[name] = self.server.sent.get(name, 0) + len(part[: fault.break_after])

    do_HEAD = do_GET  # noqa: N815, the name is http.server's

    def _answer(self, status: int, headers: dict[str, str], body: bytes, break_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:break_after])
        if break_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass
