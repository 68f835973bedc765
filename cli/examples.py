"""The examples that end each ``--help``; the test suite runs every one of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "fxq compile digits/convnet",
        "fxq diff runs/digits-convnet-aciq-4bit --stat",
        "fxq explain runs/digits-convnet-aciq-4bit",
    ),
    "compile": (
        "fxq compile digits/convnet",
        "fxq compile model.py -r minmax-int8 --set weight_bits=6 -v -o runs/mine",
        "fxq compile cifar/resnet20 -w w.safetensors -c train.npz -e test.npz -n 64",
        "fxq compile torchvision/resnet18 -r minmax-int8 -c random -n 8 -b 4",
        "fxq compile digits/convnet --set weight_bits=2 --max-drop 1 -o runs/near",
    ),
    "diff": (
        "fxq diff runs/digits-convnet-aciq-4bit --stat",
        "fxq diff runs/digits-convnet-aciq-4bit fold-batch-norm --code",
        "fxq diff runs/digits-convnet-aciq-4bit quantize-aciq --values",
        "fxq diff runs/digits-convnet-aciq-4bit capture last --node 'conv*' -y",
        "fxq diff runs/mine runs/digits-convnet-aciq-4bit --stat",
        "fxq diff runs/mine:1 runs/digits-convnet-aciq-4bit:1 --only added --dot",
    ),
    "show": (
        "fxq show runs/digits-convnet-aciq-4bit --step capture",
        "fxq show tiny/residual --no-digests",
    ),
    "explain": (
        "fxq explain runs/digits-convnet-aciq-4bit",
        "fxq explain tiny/concat --recipe aciq-4bit",
    ),
    "eval": (
        "fxq eval runs/digits-convnet-aciq-4bit",
        "fxq eval runs/mine --data model.py",
        "fxq eval runs/cifar-resnet20-aciq-4bit --data test.npz --engine fbgemm",
    ),
    "ablate": (
        "fxq ablate digits/convnet -n 64",
        "fxq ablate digits/convnet -n 64 --option weight_bits=2,3 -o widths",
        "fxq ablate model.py --option guard=false,true --seeds 0,1 -o guard",
    ),
    "analyze": (
        "fxq analyze digits/convnet -n 64 --eval-images 200",
        "fxq analyze runs/digits-convnet-aciq-4bit --sample 16",
        "fxq analyze cifar/resnet20 -w w.safetensors -c train.npz -n 64 -o sensitive",
    ),
    "bisect": (
        "fxq bisect digits/convnet --set weight_bits=2 -n 64 --bound 15",
        "fxq bisect digits/convnet --set weight_bits=2 --metric accuracy --bound 95",
        "fxq bisect model.py -r minmax-int8 --bound 20 --json",
    ),
    "cost": (
        "fxq cost torchvision/resnet18 -r apot-4bit",
        "fxq cost digits/convnet -r mixed-4bit -n 64 --json",
        "fxq cost runs/digits-convnet-aciq-4bit --csv cost.csv",
    ),
    "backward": (
        "fxq backward tiny/conv",
        "fxq backward digits/convnet -r static-int8 --full",
        "fxq backward tiny/mlp --float",
    ),
    "train": (
        "fxq train digits/convnet --epochs 2 --augmentation none",
        "fxq train digits/convnet -r apot-2bit --init runs/digits-convnet-apot-4bit",
        "fxq train cifar/resnet20 -w w.safetensors -d train.npz -b 16 --epochs 1",
    ),
    "import": (
        "fxq import cifar/resnet20 apot-4bit.pth -c train.npz -e test.npz -o runs/four",
        "fxq import cifar/resnet20 apot-2bit.pth -r apot-2bit -c train.npz -o runs/two",
    ),
    "export": (
        "fxq export runs/digits-convnet-aciq-4bit --force",
        "fxq export runs/mine --flavor compact -o compact.onnx --force",
        "fxq export runs/mine --opset 22 --static -o mine.onnx",
    ),
    "replay": ("fxq replay runs/broken.failed",),
    "report": (
        "fxq report runs/digits-convnet-aciq-4bit --force",
        "fxq report runs/mine -o mine.html --force",
    ),
    "verify": (
        "fxq verify runs/digits-convnet-aciq-4bit",
        "fxq verify runs/mine --data model.py --runtime eager --engine x86 --all",
        "fxq verify runs/digits-convnet-aciq-4bit --flavor compact --json",
    ),
    "bench": (
        "fxq bench runs/digits-convnet-aciq-4bit --rounds 5",
        "fxq bench tiny/conv -r minmax-int8,aciq-4bit --against float,torch.ao",
        "fxq bench tiny/conv -r aciq-4bit --compile-time --rounds 1",
    ),
    "passes": ("fxq passes", "fxq passes quantize-aciq"),
    "recipes": ("fxq recipes", "fxq recipes aciq-4bit"),
    "backends": ("fxq backends",),
    "models": ("fxq models", "fxq models resnet20", "fxq models 'torchvision/resnet*'"),
}


def epilog(command: str) -> str:
    """The end of the help of a command."""
    heading = "Example:" if len(EXAMPLES[command]) == 1 else "Examples:"
    return "\n".join((heading, *EXAMPLES[command]))
