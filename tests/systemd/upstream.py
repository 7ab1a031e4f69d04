"""A stand-in Responses API on 127.0.0.1:9001, over plain sockets, or over TLS: upstream.py [CERTIFICATE KEY].

A request's JSON body says how many events the answer has and how many seconds lie between them, or that each waits
for the one before to be seen: `"seen": FOLDER` says so by a file for each, named by its number. Each key that comes
in is a line of /run/upstream.keys.
"""

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


def serve(connection, keys):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = connection.makefile("rb")
    try:
        while lines := head(reader):
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            wanted = json.loads(body(reader, headers) or b"{}")
            os.write(keys, headers.get("authorization", "none").encode() + b"\n")
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
        # shaken hands in the connection's own thread, at its first read
        listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, keys), daemon=True).start()


main()
