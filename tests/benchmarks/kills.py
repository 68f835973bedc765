"""Kills at random times: the same command ends as if there had been none, and no half run loads.

    python tests/benchmarks/kills.py --count 20 --seed 0 [--kinds train,adaround] [--signal INT]

For each kind of work ``fxq`` runs once undisturbed. Then, count times, it is started, killed,
started again with the same command, killed once more, and then left alone. Every other kill comes
at any time, the others while the output is being written. After each kill the output is absent, or
loads whole; in the end its weights and structure are those of the undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import track

import fxq
from fxq.errors import FxqError

START = (
    "import fxq.workspace; fxq.workspace.INTERVAL = 0; fxq.workspace._SHARE = 1e9\n"
    "from fxq.cli.main import main; main()"
)
COMMON = ("digits/convnet", "--threads", "1", "--eval-images", "60", "-o", "out")
KINDS = {
    "compile": ("compile", *COMMON, "-r", "minmax-int8", "-n", "64"),
    "calibrate": ("compile", *COMMON, "-r", "aciq-4bit", "-n", "1347", "-b", "1"),
    "adaround": (
        *("compile", *COMMON, "-r", "adaround-4bit", "-n", "256"),
        *("--set", "adaround.iterations=300"),
    ),
    "train": (
        *("train", *COMMON, "-n", "1024", "-b", "32", "--epochs", "2"),
        *("--calibration-images", "64", "--checkpoint-seconds", "0.05"),
    ),
}
KILLS = 2
"""How often a command is killed before it is left alone."""
SECONDS = 600
"""How long a command may take."""


@dataclass(frozen=True)
class Subject:
    """A command, and what it gives where nobody disturbs it.

    Attributes:
        kind: Its name.
        whole: The undisturbed run.
        seconds: How long that took.
    """

    kind: str
    whole: Path
    seconds: float

    def start(self, place: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", START, *KINDS[self.kind]]
        return subprocess.Popen(
            command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def undisturbed(kind: str, place: Path) -> Subject:
    place.mkdir()
    start = time.monotonic()
    subject = Subject(kind, place / "out", 0.0)
    told, _ = subject.start(place).communicate(timeout=SECONDS)
    if not subject.whole.exists():
        raise SystemExit(f"{kind} fails undisturbed:\n{told}")
    return Subject(kind, subject.whole, time.monotonic() - start)


def disturbed(subject: Subject, place: Path, random: Random, how: signal.Signals) -> Iterator[str]:
    """What is wrong with a run that is killed and started again; nothing, one would hope."""
    place.mkdir()
    out = place / "out"
    for _ in range(KILLS):
        with subject.start(place) as process:
            wait(process, place, random, subject.seconds)
            process.send_signal(how)
            process.communicate(timeout=SECONDS)
        yield from half(out)
        if out.exists():
            break
    if not out.exists():
        with subject.start(place) as process:
            told, _ = process.communicate(timeout=SECONDS)
        if process.returncode:
            yield f"it does not end well: {told[-400:]!r}"
            return
    for name in ("weights.safetensors", "structure.json"):
        if (out / name).read_bytes() != (subject.whole / name).read_bytes():
            yield f"{name} is another than without kills"
    left = {path.name for path in place.iterdir() if not path.name.startswith(".out-")} - {"out"}
    if left:
        yield f"{sorted(left)} are left behind"


def wait(process: subprocess.Popen[str], place: Path, random: Random, seconds: float) -> None:
    """Until the kill: any time, or a moment after the output has begun to be written."""
    is_late, end = random.random() < 0.5, time.monotonic() + random.random() * seconds
    while process.poll() is None and (is_late or time.monotonic() < end):
        if is_late and any(place.glob(".out-*")):
            time.sleep(random.random() * 0.03)
            return
        time.sleep(0.001)


def half(out: Path) -> Iterator[str]:
    """What is wrong with the output after a kill."""
    if not out.exists():
        return
    try:
        fxq.load(out)
    except FxqError as error:
        yield f"a half run is there: {error.what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--signal", default="KILL", choices=("KILL", "INT", "TERM"))
    given = parser.parse_args()
    how = signal.Signals[f"SIG{given.signal}"]
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        for kind in given.kinds.split(","):
            subject = undisturbed(kind, Path(name, kind))
            console = Console(stderr=True)
            for number in track(range(given.count), description=kind, console=console):
                random = Random(f"{given.seed} {kind} {number}")
                for told in disturbed(subject, Path(name, f"{kind}{number}"), random, how):
                    wrong += 1
                    print(f"{kind} {number}: {told}", flush=True)
            print(f"{kind}: {given.count} of {subject.seconds:.1f} s each were killed", flush=True)
    print(f"{wrong} violations")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
