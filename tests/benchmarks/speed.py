"""How fast compiled networks run beside float and torch.ao: ratios within interleaved rounds."""

from __future__ import annotations

import sys

from fxq.cli.bench import Request, run

NETWORKS = ("torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2")


def main() -> None:
    for name in sys.argv[1:] or NETWORKS:
        print(f"\n{name}", flush=True)
        run(Request(name, ["minmax-int8", "aciq-4bit"], ["float", "torch.ao"], threads=2))


if __name__ == "__main__":
    main()
