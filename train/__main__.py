import sys

from . import cli
from .common.hosts import leave

if __name__ == "__main__":
    code = cli.main()
    if code:
        leave(code)
    sys.exit(code)
