"""Changes to files: bytes, JSON, TOML and safetensors, drawn by a seeded generator."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

Change = Callable[[Path, Random], str]
"""Changes a file; says how."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 255, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.5, 1e-320),
    *(math.nan, math.inf, "", "0", "../../../etc/passwd", "/etc/passwd", "os.system", "x" * 10_000),
    *("\ud800", "a\x00b", [], {}, [[]], {"register": "x"}, {"tuple": 3}, {"float": "1e999"}),
    *({"slice": [0]}, {"dtype": "object"}, {"device": "cuda:99"}, [-1, 10**12]),
]
TOML_VALUES = [
    *("true", "-1", "0", "1", "999999999999999999999", "nan", "inf", "-0.5", "1e999", '""', "[]"),
    *("'../../etc/passwd'", "[[1], {a = 1}]", "1979-05-27", "{}", "9" * 5000, '"\\ud800"'),
    *("[" * 3000, "1979-13-99", '"os.system"', "0x7fffffffffffffff", "'''", "\x00"),
]


# ---- bytes ---------------------------------------------------------------------------------------


def flip_bits(path: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    places = [random.randrange(len(content) * 8) for _ in range(random.choice((1, 1, 1, 8)))]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bits {places} flipped"


def cut(path: Path, random: Random) -> str:
    content = path.read_bytes()
    size = random.randrange(len(content))
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


def insert_bytes(path: Path, random: Random) -> str:
    content = path.read_bytes()
    at, new = random.randrange(len(content) + 1), random.choice((b"\xff\xfe", b"\x00" * 9, b"}]"))
    path.write_bytes(content[:at] + new + content[at:])
    return f"{new!r} put in at {at}"


def repeat(path: Path, random: Random) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "written twice"


def nest(path: Path, random: Random) -> str:
    text = random.choice(("[", '{"a":', "[[1],", "a = ["))
    path.write_text(text * 50_000, encoding="utf-8")
    return f"{text!r} 50000 times"


def link(path: Path, random: Random) -> str:
    path.unlink()
    path.symlink_to(random.choice(("/dev/zero", "/nowhere", "/etc/passwd", ".")))
    return f"a link to {path.readlink()}"


ANY: list[Change] = [flip_bits, flip_bits, flip_bits, cut, insert_bytes, repeat, nest, link]


# ---- JSON ----------------------------------------------------------------------------------------


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it."""
    found: list[tuple[Any, Any]] = []
    pending = [data]
    while pending:
        one = pending.pop()
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            pending += [one[key] for key in keys]
    return found


def change_json(path: Path, random: Random) -> str:
    """One value is another, missing, twice there, or has a neighbour it should not have."""
    data = json.loads(path.read_text())
    places = _places(data)
    if not places:
        return nest(path, random)
    owner, key = random.choice(places)
    kind = random.choice(("value", "value", "value", "number", "missing", "extra", "swap"))
    if kind == "missing":
        del owner[key]
    elif kind == "extra" and isinstance(owner, dict):
        owner[random.choice(("__class__", "evil", "foreign", ""))] = random.choice(VALUES)
    elif kind == "extra":
        owner.insert(key, random.choice(VALUES))
    elif kind == "swap":
        other, place = random.choice(places)
        owner[key] = json.loads(json.dumps(other[place]))
    elif kind == "number" and type(owner[key]) in (int, float):
        owner[key] = random.choice((-owner[key], owner[key] + 1, owner[key] * 10**9))
    else:
        owner[key] = random.choice(VALUES)
    path.write_text(json.dumps(data), encoding="utf-8")
    return f"{kind} at {key!r}"


def duplicate_key(path: Path, random: Random) -> str:
    text = path.read_text()
    keys = list(re.finditer(r'"(\w+)": ', text))
    if not keys:
        return cut(path, random)
    found = random.choice(keys)
    new = f'"{found[1]}": {json.dumps(random.choice(VALUES))}, '
    path.write_text(text[: found.start()] + new + text[found.start() :], encoding="utf-8")
    return f"a second {found[1]!r}"


def newer_format(path: Path, random: Random) -> str:
    data = json.loads(path.read_text())
    if isinstance(data, dict):
        data["format"] = random.choice((0, 99, "99", None, 2.5, [2]))
    path.write_text(json.dumps(data), encoding="utf-8")
    return "another format"


JSON: list[Change] = [*ANY, *([change_json] * 12), duplicate_key, duplicate_key, newer_format]


# ---- safetensors ---------------------------------------------------------------------------------


def change_header(path: Path, random: Random) -> str:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    owner, key = random.choice(_places(header))
    kind = random.choice(("shape", "dtype", "value", "name", "length"))
    names = [name for name in header if name != "__metadata__"]
    one = header[random.choice(names)]
    if kind == "shape":
        one["shape"] = random.choice(([2**40], [2**62, 4], [-1], [0], [2**63, 2**63], ["1"], 3))
    elif kind == "dtype":
        one["dtype"] = random.choice(("F64", "I8", "BOOL", "F8_E4M3", "evil", "BF16", None))
    elif kind == "name":
        header[random.choice(("../../evil", "", "\x00"))] = header.pop(random.choice(names))
    else:
        owner[key] = random.choice(VALUES)
    text = json.dumps(header).encode()
    length = random.choice((2**63, 2**40, 0, len(text) - 1)) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + content[8 + size :])
    return f"header: {kind}"


def change_tensors(path: Path, random: Random) -> str:
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    name = random.choice(sorted(tensors))
    kind = random.choice(("nan", "inf", "zero", "negative", "dtype", "longer", "gone", "foreign"))
    value = tensors[name]
    if kind in ("nan", "inf", "zero") and value.numel():
        number = 0.0 if kind == "zero" or not value.is_floating_point() else float(kind)
        value.view(-1)[random.randrange(value.numel())] = number
    elif kind == "negative" and value.dtype is not torch.uint8:
        tensors[name] = -value
    elif kind == "dtype":
        tensors[name] = value.to(random.choice((torch.float64, torch.int64, torch.bool)))
    elif kind == "longer":
        tensors[name] = torch.cat((value.view(-1), value.view(-1)))
    elif kind == "gone":
        del tensors[name]
    else:
        tensors = {"weight": torch.zeros(3)}
    safetensors.torch.save_file(tensors, path)
    return f"{name}: {kind}"


TENSORS: list[Change] = [*ANY, change_header, change_header, change_header, *([change_tensors] * 4)]


# ---- TOML ----------------------------------------------------------------------------------------


def change_toml(path: Path, random: Random) -> str:
    lines = path.read_text().splitlines()
    at = random.choice([number for number, line in enumerate(lines) if line.strip()])
    kind = random.choice(("value", "value", "value", "value", "twice", "gone", "new", "key"))
    key, equals, _ = lines[at].partition(" = ")
    value = random.choice(TOML_VALUES)
    if kind == "value" and equals:
        lines[at] = f"{key} = {value}"
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "gone":
        del lines[at]
    elif kind == "key":
        lines[at] = lines[at].replace("e", "", 1)
    else:
        lines.append(random.choice(('[layer."*"]', "[layer.x.y]", "[[pass]]", "evil = 1")))
        lines.append(f"{random.choice(('weight_bits', 'skip', 'use', 'bits'))} = {value}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{kind} at line {at + 1}: {lines[min(at, len(lines) - 1)][:60]!r}"


TOML: list[Change] = [*ANY, *([change_toml] * 16)]


def changes_for(path: Path) -> list[Change]:
    """The changes that suit a file."""
    known = {".json": JSON, ".safetensors": TENSORS, ".toml": TOML}
    return known.get(path.suffix, ANY)
