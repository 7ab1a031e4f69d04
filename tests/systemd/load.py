"""Four clients that send requests one by one, each over a new connection, until /run/load.stop exists.

Each complete response appends a byte to /run/load.whole. Prints the totals as one line of JSON.
"""

import json
import os
import socket
import sys
import threading

REQUEST = (
    b"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 28\r\n\r\n" + b'{"events": 3, "pause": 0.01}'
)


def one(port):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(REQUEST)
        response = b""
        while part := connection.recv(65536):
            response += part
    head, _, body = response.partition(b"\r\n\r\n")
    # a response that was complete before its head was sent may have a length instead of chunks
    end = b"0\r\n\r\n" if b"\r\ntransfer-encoding: chunked" in head.lower() else b"data: 3 of 3\n\n"
    if not head.startswith(b"HTTP/1.1 200 ") or b"3 of 3" not in body or not body.endswith(end):
        raise ValueError(f"incomplete response: {response!r}")


def client(port, whole, errors):
    while not os.path.exists("/run/load.stop"):
        try:
            one(port)
            os.write(whole, b".")
        except (OSError, ValueError) as error:
            errors.append(repr(error))


def main():
    whole = os.open("/run/load.whole", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    errors = []
    clients = [threading.Thread(target=client, args=(int(sys.argv[1]), whole, errors)) for _ in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    print(json.dumps({"whole": os.fstat(whole).st_size, "failed": len(errors), "errors": errors[:5]}))


main()
