"""This machine's CPU, for the records of benchmarks: ratios differ from one CPU to the next."""

import os
import pathlib
import platform
import re


def cpu() -> str:
    """Its model and number of cores, such as "AMD EPYC, 2 cores"."""
    # platform.processor() is empty on Linux.
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
