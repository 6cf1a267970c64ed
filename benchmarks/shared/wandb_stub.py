"""A wandb server for online runs on this machine, which accepts everything and stores nothing.

    python benchmarks/shared/wandb_stub.py
    WANDB_BASE_URL=http://127.0.0.1:<port> WANDB_API_KEY=<any 40 letters> python ...

``faults.py`` tests with it what a run does when its server dies. It takes a free port, prints the
port as the first line, and a line for each request.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@contextmanager
def wandb_stub(log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server as a process, killed at the end.

    Args:
        log: Gets its lines.

    Yields:
        The process and its port.

    Raises:
        RuntimeError: If it ends before it has a port.
    """
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, __file__], stdout=output)
    try:
        while not log.read_text().endswith("\n"):
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"wandb_stub.py ended with {process.returncode}.")
        yield process, int(log.read_text().split("\n")[0])
    finally:
        process.kill()
        process.wait()


class Handler(BaseHTTPRequestHandler):
    """Answers the queries that begin a run, and takes whatever is uploaded."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """A GraphQL query, or rows of a run."""
        body = self._body()
        asked = json.loads(body) if self.path.endswith("graphql") else {}
        print("POST", self.path, asked.get("operationName", ""), flush=True)
        self._send({"data": self._answer(asked)} if asked else {})

    def do_PUT(self) -> None:
        """A file."""
        self._body()
        self._send({})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        variables = asked.get("variables", {})
        match asked.get("operationName"):
            case "Viewer":
                return {"viewer": {"id": "user", "entity": "me", "username": "me", "flags": "{}"}}
            case "UpsertBucket":
                owner = {"id": "owner", "name": "me"}
                bucket = {
                    "id": "bucket",
                    "name": variables["name"],
                    "displayName": variables["name"],
                    "historyLineCount": 0,
                    "project": {"id": "project", "name": "project", "entity": owner},
                }
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateRunFiles":
                address = f"http://{self.headers['Host']}/files"
                files = [{"name": n, "uploadUrl": f"{address}/{n}"} for n in variables["files"]]
                made = {"runID": "bucket", "uploadHeaders": [], "files": files}
                return {"createRunFiles": made}
        return {}


def main() -> None:
    """Serve until the process ends."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
