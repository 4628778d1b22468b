"""Damage to bytes, and lies in values of JSON."""

import copy

from .case import Case

LIES = (
    None, True, False, 0, 1, -1, 2, 3, 5.7, -0.0, 1e308, 10**400, 2**31, 2**63, 2**64, 10**9, "", "x", "0", "0.U", "inf", "nan",
    [], {}, [1], [[]], {"x": {}}, {"$tensor": "0.U"}, {"$tensor": "nope"}, {"$float": "nan"}, {"$float": "inf"},
    {"$tuple": []}, {"$dict": [[1, 2]]}, {"$dict": [[[], 1]]}, {"$counter": 5}, "\ud800", "a\nb", "\0", "(a+)+$", "x" * 10_000,
    float("nan"), float("inf"), "rms", "I32", "F16", "CondLRSGD", [1 << 40, 1 << 20], [0, 10**12], "vgg16", "../../etc/passwd",
)  # fmt: skip


def damaged(case: Case, content: bytes, end: int | None = None, places=None) -> tuple[bytes, str]:
    """Return damaged bytes, and how.

    Args:
        case: Source of chance.
        content: What is whole.
        end: Only bytes before this are changed.
        places: Only these are changed; the default is all before `end`.
    """
    places = places or range(min(end or len(content), len(content)))
    at = case.random.choice(places)
    kind = case.random.choice(["flip"] * 6 + ["byte", "bytes", "cut", "drop", "insert", "double", "swap", "zeros"])
    new = bytearray(content)
    if kind == "flip":
        new[at] ^= 1 << case.random.randrange(8)
    elif kind == "byte":
        new[at] = case.random.choice([0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x2D])
    elif kind == "bytes":
        for _ in range(case.random.randint(2, 20)):
            new[case.random.choice(places)] = case.random.randrange(256)
    elif kind == "cut":
        del new[at:]
    elif kind == "drop":
        del new[at : at + case.random.randint(1, 16)]
    elif kind == "insert":
        new[at:at] = case.random.randbytes(case.random.randint(1, 16))
    elif kind == "double":
        new[at:at] = new[at : at + case.random.randint(1, 64)]
    elif kind == "swap":
        other = case.random.choice(places)
        new[at], new[other] = new[other], new[at]
    elif kind == "zeros":
        new[at : at + 8] = bytes(len(new[at : at + 8]))
    return bytes(new), f"{kind} at {at} of {len(content)} bytes"


def changed_json(case: Case, value) -> tuple[object, str]:
    """Return a copy of a value of JSON with one place in it changed, removed, doubled or renamed, and how."""
    value = copy.deepcopy(value)
    place, path = value, ""
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return case.random.choice(LIES), "all of it is a lie"
        key = case.random.choice(keys)
        path += f"/{str(key)[:30]}"
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or case.maybe(0.2):
            break
        place = inner
    kind = case.random.choice(["lie"] * 5 + ["remove", "rename", "add", "number"])
    if kind == "remove":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[case.random.choice(["", "x", f"{key}x", "$tensor", "$dict", "a\nb", "0.S"])] = place.pop(key)
    elif kind == "add" and isinstance(place, dict):
        place[case.random.choice(["x", "$float", "lora_B.weight", "1", "tau", "params"])] = case.random.choice(LIES)
    elif kind == "add":
        place.append(copy.deepcopy(inner))
    elif kind == "number" and type(inner) in (int, float):
        place[key] = inner + case.random.choice([1, -1, 0.5, 10**6])
    else:
        kind = "lie"
        place[key] = lie = case.random.choice(LIES)
        return value, f"{path} = {str(lie)[:40]!r}"
    return value, f"{kind} {path}"
