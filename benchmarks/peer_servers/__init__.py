"""Other projects' Tinker-shaped servers: each in an environment of its own, checked by `pullback check backend`.

    python -m benchmarks.peer_servers --folder build/peers          # all of them
    python -m benchmarks.peer_servers tuft --folder build/peers       # one

The folder keeps the environments, the model and the reports (Markdown, JSON, logs). Servers listen on 127.0.0.1 and end
with the check. Needs Python 3.11 and 3.12 on the path, and 6 GB of disk.
"""
