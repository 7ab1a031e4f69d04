"""websocket.py PORT [HOLD]: opens a WebSocket, sends a message and prints the reply to it.

Prints the status instead if the handshake is rejected. The connection stays open as long as the file HOLD exists.
"""

import os
import socket
import sys
import time

HANDSHAKE = (
    b"GET /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
# what RFC 6455, section 1.3, gives for that key
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def main():
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) as connection:
        connection.sendall(HANDSHAKE)
        reader = connection.makefile("rb")
        head = []
        while line := reader.readline().decode().rstrip():
            head.append(line)
        status = head[0].split()[1]
        if status != "101":
            print(status)
            return
        if ACCEPT not in (line.partition(":")[2].strip() for line in head[1:]):
            raise ValueError(f"no Sec-WebSocket-Accept: {head}")
        # a text frame with a mask of zeros
        connection.sendall(b"\x81\x85\0\0\0\0hello")
        _, length = reader.read(2)
        print(reader.read(length).decode(), flush=True)
        while len(sys.argv) > 2 and os.path.exists(sys.argv[2]):
            time.sleep(0.1)


main()
