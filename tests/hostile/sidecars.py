"""What lies beside the weights: links and pipes, names that hide, code, and what is nobody else's business."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from tests.hostile.case import TOKEN, Case, Place, fifo, fine, malformed, missing, unfit, unsafe
from tests.hostile.checkpoints import a_folder, device, listening
from tests.refusals.making import MARKER, VOCABULARY

DEEP = "[" * 100_000


def linked(name: str, target: str) -> Callable[[Place], object]:
    """A link in the base."""
    return lambda place: place.link(f"base/{name}", target)


def special(name: str, make: Callable[[str], object]) -> Callable[[Place], object]:
    """A file in the base that is not regular."""
    return lambda place: place.special(f"base/{name}", make)


def written(*names: str, data: str = "x = 1\n") -> Callable[[Place], object]:
    """Files in the base."""
    return lambda place: [place.write(f"base/{name}", data) for name in names]


def tokenizer(data: str) -> Callable[[Place], object]:
    """A tokenizer beside the adapter."""
    return lambda place: place.write("adapter/tokenizer.json", data)


def report_says(name: str, rule: str) -> Callable[[Place], str]:
    """Whether the report names what was left out, and by which rule."""

    def look(place: Place) -> str:
        found = json.loads((place.out / MARKER).read_text())["left_out"]
        there = (place.out / name).exists()
        return "" if rule in found.get(name, "") and not there else f"{name} is there, or not said: {found}"

    return look


def has_code(*names: str) -> Callable[[Place], str]:
    """Whether code was copied, and the report names it."""

    def look(place: Place) -> str:
        found = json.loads((place.out / MARKER).read_text())["code"]
        there = [name for name in names if (place.out / name).is_file()]
        return "" if found == sorted(names) == sorted(there) else f"code in the report {found}, in the output {there}"

    return look


def without_code(place: Place) -> None:
    """Code in the base, and the option that leaves it out."""
    written("modeling.py", "sub/more.PY")(place)
    place.config(auto_map={"AutoModel": "modeling.Model"})
    place.options.append("--no-code")


def linked_folder(place: Place) -> None:
    """A folder of sidecars that is a link to the outside."""
    (place.base / "assets").symlink_to(place.outside, target_is_directory=True)


def not_utf8(place: Place) -> None:
    """A name that no JSON can hold."""
    with open(os.fsencode(place.base) + b"/\xff.txt", "wb"):
        pass


def wanderer(place: Place) -> None:
    """A folder of modules that is elsewhere."""
    place.write("base/modules.json", json.dumps([{"path": "../../outside"}]))


SECRETS = {
    "token": "token",
    "stored_tokens": "stored_tokens",
    ".env": ".env",
    ".netrc": ".netrc",
    ".git/config": ".git/",
    ".huggingface/token": ".huggingface/",
    ".cache/huggingface/token": ".cache/",
    "sub/.env": "sub/.env",
    ".ssh/id_ed25519": ".ssh/",
}
HIDING = {
    "an escape sequence": "a\x1b[2Jb.txt",
    "a line feed": "a\nerror: forged.txt",
    "a direction": "a\u202etxt.exe",
    "no width": "a\u200bb.txt",
    "C1 control": "a\x9b2Jb.txt",
}
CASES: tuple[Case, ...] = (
    unsafe("sidecar: a link to a secret", linked("notes.txt", "../outside/secret.txt"), "a link that leads out"),
    unsafe("sidecar: a link to /etc/passwd", linked("notes.txt", "/etc/passwd"), "a link that leads out"),
    unsafe("sidecar: a link to this process", linked("notes.txt", "/proc/self/environ"), "a link that leads out"),
    unsafe("sidecar: code behind a link", linked("modeling.py", "../outside/code.py"), "a link that leads out"),
    unsafe("sidecar: a folder behind a link", linked_folder, "a link that leads out"),
    unsafe("sidecar: a link to a folder inside", linked("here", "."), "not a regular file"),
    missing("sidecar: a link to nothing", linked("notes.txt", "nothing"), "does not exist"),
    Case("sidecar: a link to itself", linked("notes.txt", "notes.txt"), 3, "InputReadError", ("cannot resolve",)),
    unsafe("sidecar: a pipe", special("notes.txt", fifo), "not a regular file"),
    unsafe("sidecar: a device", special("notes.txt", device), "not a regular file"),
    Case("sidecar: a socket", special("notes.txt", listening), 3, "InputReadError", ("cannot open",)),
    unsafe("sidecar: a name that is not UTF-8", not_utf8, "its name is not UTF-8"),
    unsafe("sidecar: modules elsewhere", wanderer, "the subfolder"),
    malformed("sidecar: modules that are deep", written("modules.json", data=DEEP), "nested deeper"),
    fine("sidecar: a folder named like a file", special("extra.json", a_folder)),
    *(fine(f"sidecar: a name with {what}", written(name)) for what, name in HIDING.items()),
    *(fine(f"secret: {name}", written(name, data=TOKEN), look=report_says(left, "")) for name, left in SECRETS.items()),
    fine(
        "code: it is copied and named",
        written("a.py", "sub/b.py"),
        "`a.py`, `sub/b.py`",
        look=has_code("a.py", "sub/b.py"),
    ),
    fine("code: its name hides", written("a\u202eyp.py"), "a\\u202eyp.py", look=has_code("a\u202eyp.py")),
    fine("code: it is left out", without_code, "`auto_map`", look=report_says("sub/more.PY", "Python code")),
    fine("code: a marker of ours", written(MARKER, ".streammerge/run.json", data="{}"), look=lambda place: ""),
    unsafe(
        "tokenizer: a link out of the adapter",
        lambda place: place.link("adapter/tokenizer.json", "../outside/secret.json"),
        "a link that leads out",
    ),
    unsafe("tokenizer: a pipe", lambda place: place.special("adapter/tokenizer.json", fifo), "not a regular file"),
    malformed("tokenizer: deep", tokenizer('{"model":' * 50_000), "nested deeper"),
    malformed("tokenizer: merges without an end", tokenizer('{"merges":[' + '"a b",' * 500_000), "JSON"),
    malformed(
        "tokenizer: a vocabulary of 1.5 million",
        tokenizer('{"model":{"vocab":{' + ",".join(f'"{n}":{n}' for n in range(1_500_000)) + "}}}"),
        "hold so many values",
    ),
    unfit("BaseMismatchError")(
        "tokenizer: one id of 10^30",
        tokenizer(json.dumps({"model": {"vocab": {"a": 10**30}}})),
        f"the embedding has {VOCABULARY} rows",
    ),
)
