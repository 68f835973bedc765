"""What compiling costs beside torch.ao: wall time and peak memory, each in a process of its own."""

from __future__ import annotations

import sys

from fxq.cli.bench import Request
from fxq.cli.compile_time import run

NETWORKS = ("torchvision/resnet18", "torchvision/mobilenet_v2")


def main() -> None:
    for name in sys.argv[1:] or NETWORKS:
        print(f"\n{name}", flush=True)
        run(Request(name, ["minmax-int8", "aciq-4bit"], ["torch.ao"], threads=2, rounds=3))


if __name__ == "__main__":
    main()
