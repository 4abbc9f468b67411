"""Every release of the official SDK against our service: train, save, load, sample, score, list, download.

Run by hand, as each release is downloaded: ``python -m benchmarks.sdk_versions 0.10.0 0.38.0``. A release lies in a folder of
its own in front of this environment, which has what all of them require; what it requires beyond that is reported. One round
(`one_round`) runs in a process for each, against one service of the tiny model on 127.0.0.1. A table, and one JSON document.
"""
