"""A stand-in for a service: answers GET /ready on its port, dies at its start when told by a file."""

import http.server
import os
import signal
import sys
from pathlib import Path


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()


if Path(os.environ["DIE_IF_EXISTS"]).exists():
    sys.exit("the stand-in was told to die")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
address = (os.environ["BATON_HTTP_HOST"], int(os.environ["BATON_HTTP_PORT"]))
sys.stderr.write("the stand-in listens\n")
http.server.HTTPServer(address, Answer).serve_forever()
