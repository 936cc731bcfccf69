"""The program of --exercise: hands its arguments to the site's socket, and ends as that says."""

import socket
import sys

with socket.socket(socket.AF_UNIX) as site:
    site.connect(sys.argv[1])
    site.sendall(" ".join(sys.argv[2:]).encode() + b"\n")
    sys.exit(int(site.recv(8)))
