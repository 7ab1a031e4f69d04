"""A stand-in Responses API on 127.0.0.1:9001, plain or with TLS: upstream.py [CERTIFICATE KEY].

The JSON body of a request has the number of `events` in the response, and the `pause` between them in seconds. With
`"seen": DIRECTORY`, each event after the first is sent once a file exists there whose name is the number of the event
before. WebSocket messages are echoed. The Authorization header of each request is a line of /run/upstream.keys.
"""

import base64
import hashlib
import json
import os
import socket
import sys
import threading
import time


def head(reader):
    lines = []
    while line := reader.readline():
        if line == b"\r\n":
            return lines
        lines.append(line.decode().rstrip())
    return None


def body(reader, headers):
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while size := int(reader.readline(), 16):
            whole += reader.read(size)
            reader.readline()
        reader.readline()
        return whole
    return reader.read(int(headers.get("content-length", 0)))


def echo(connection, reader, key):
    """Accepts a WebSocket handshake and echoes messages of up to 125 bytes."""
    accept = base64.b64encode(hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-accept: %s\r\n\r\n" % accept
    )
    while head := reader.read(2):
        length = head[1] & 0x7F
        mask = reader.read(4)
        message = bytes(byte ^ mask[i % 4] for i, byte in enumerate(reader.read(length)))
        connection.sendall(bytes([head[0], length]) + message)


def serve(connection, keys):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = connection.makefile("rb")
    try:
        while lines := head(reader):
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            os.write(keys, headers.get("authorization", "none").encode() + b"\n")
            if headers.get("upgrade") == "websocket":
                echo(connection, reader, headers["sec-websocket-key"])
                break
            wanted = json.loads(body(reader, headers) or b"{}")
            connection.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            events = wanted.get("events", 1)
            for number in range(events):
                if number and "seen" in wanted:
                    while not os.path.exists(f"{wanted['seen']}/{number}"):
                        time.sleep(0.01)
                elif number:
                    time.sleep(wanted.get("pause", 0.05))
                event = b"data: %d of %d\n\n" % (number + 1, events)
                connection.sendall(b"%x\r\n%s\r\n" % (len(event), event))
            connection.sendall(b"0\r\n\r\n")
    except OSError:
        pass
    connection.close()


def main():
    keys = os.open("/run/upstream.keys", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    listener = socket.create_server(("127.0.0.1", 9001), backlog=512)
    if len(sys.argv) > 1:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sys.argv[1:])
        # The handshake takes place in the connection's thread, at its first read.
        listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, keys), daemon=True).start()


main()
