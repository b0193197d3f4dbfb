"""As much of wandb's server as one run needs, and the log that wandb writes of a run."""

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 32_768  # bytes; a record does not cross them in one piece


def read_log(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, those of LevelDB's log format; half a record at the end is left out.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    log, position, pieces = path.read_bytes(), 7, b""  # behind wandb's own header
    while position + 7 <= len(log):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        piece = log[position + 7 : position + 7 + length]
        position += 7 + length
        if len(piece) < length:
            return
        pieces += piece
        if kind in (1, 4):  # the whole or the last piece
            yield Record.FromString(pieces)
            pieces = b""


class WandbServer(ThreadingHTTPServer):
    """Holds one run in memory.

    Attributes:
        history: its rows.
        exit_codes: of its starts.
        environment: for the processes that are to use it.
    """

    daemon_threads = True

    def __init__(self, hangs: bool = False) -> None:
        """`hangs`: uploads of data are never answered."""
        super().__init__(("127.0.0.1", 0), Requests)
        self.history: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.exists, self.hangs, self.closing = False, hangs, threading.Event()
        self.environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "0" * 40}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        super().__exit__(*error)

    def upload(self, data: dict[str, Any]) -> None:
        if self.hangs:
            self.closing.wait()
        for name, chunk in (data.get("files") or {}).items():
            if name.endswith("history.jsonl"):
                self.history[chunk["offset"] :] = map(json.loads, chunk["content"])
        if data.get("complete"):
            self.exit_codes.append(data["exitcode"])

    def answer(self, query: str) -> dict[str, Any]:
        project = {"id": "p", "name": "rear", "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": len(self.history)}
        if "RunResumeStatus" in query:
            last = json.dumps(self.history[-1]) if self.history else "{}"
            run |= {"summaryMetrics": last, "historyTail": json.dumps([last]), "eventsTail": "[]", "tags": []}
            run |= {"eventsLineCount": 0, "logLineCount": 0, "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": run if self.exists else None}}
        if "UpsertBucket" in query:
            self.exists = True
            return {"upsertBucket": {"bucket": {**run, "project": project}, "inserted": True}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}  # none is wanted
        return {"viewer": {"id": "u", "entity": "me", "username": "me"}} if "Viewer" in query else {}


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        reply = "{}"
        if self.path.endswith("file_stream"):
            self.server.upload(json.loads(body))
        elif self.path.endswith("graphql"):
            reply = json.dumps({"data": self.server.answer(json.loads(body)["query"])})
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply.encode())
