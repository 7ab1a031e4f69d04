"""Requests over ever new connections, one every 50 ms, until the file /run/load.stop is there.

Prints what came of them as one line of JSON.
"""

import json
import os
import socket
import sys
import threading
import time

REQUEST = (
    b"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 28\r\n\r\n" + b'{"events": 3, "pause": 0.01}'
)


def one(port):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(REQUEST)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    if not answer.startswith(b"HTTP/1.1 200 ") or b"3 of 3" not in answer or not answer.endswith(b"0\r\n\r\n"):
        raise ValueError(f"not a whole answer: {answer!r}")


def main():
    port = int(sys.argv[1])
    results = {"whole": 0, "failed": 0, "slowest": 0.0, "errors": []}
    lock = threading.Lock()

    def request():
        start = time.monotonic()
        error = None
        try:
            one(port)
        except (OSError, ValueError) as raised:
            error = repr(raised)
        with lock:
            results["failed" if error else "whole"] += 1
            results["slowest"] = max(results["slowest"], round(time.monotonic() - start, 2))
            if error and len(results["errors"]) < 5:
                results["errors"].append(error)

    threads = []
    while not os.path.exists("/run/load.stop"):
        thread = threading.Thread(target=request)
        thread.start()
        threads.append(thread)
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    print(json.dumps(results))


main()
