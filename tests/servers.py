"""Servers of the tests: they stand in for those of vLLM and others, which need more than this
machine has. They speak the protocol only, with faults on demand; no model is behind them."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(*answers, by_path=None):
    """A server that gives these (status, body[, headers]) answers in turn, the last one for ever.

    ``by_path``: path -> function of the request's JSON, which gives an answer; None for the torn
    answer of a server that dies. Other paths get the answers in turn, or 404 where there are none;
    so does vLLM's /tokenize, which only a few servers have. Yields the address, and what it was
    sent: (path, headers, body).
    """
    sent, lock, given = [], threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                if self.path in (by_path or {}):
                    sent.append((self.path, dict(self.headers), body))
                    answer = by_path[self.path](body)
                elif self.path == "/tokenize" or not answers:
                    answer = (404, "no such path")
                else:
                    sent.append((self.path, dict(self.headers), body))
                    answer = answers[min(len(given), len(answers) - 1)]
                    given.append(answer)
            if answer is None:  # torn: less than was announced
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
                return
            status, text, *headers = answer
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", sent
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def reply(text, **more):
    """A good answer of /chat/completions."""
    usage = {"prompt_tokens": 11, "completion_tokens": 3}
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return 200, json.dumps({"model": "m-1", "choices": [choice], "usage": usage, **more})
