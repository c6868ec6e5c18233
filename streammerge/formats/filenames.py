"""What the files of a checkpoint are, told from their names alone.

Owns the tables that say which files are weights, which belong to a tokenizer, and which a merged checkpoint does not
get. Opens nothing. The one invariant: a file that no row names is a sidecar and is copied, so that a new kind of file
is never lost for want of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import basename, dirname

from streammerge.core import strict_json
from streammerge.core.errors import MalformedInputError, UnsafeInputError

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_BIN, TORCH_BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
MODULES = "modules.json"
"""sentence-transformers' list of the folders that hold the parts of a model."""

_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_TORCH_BIN = ("*.bin", "*.bin.index.json")


@dataclass(frozen=True, slots=True)
class Rule:
    """Files that a merged checkpoint does not get: `anywhere` patterns match any part of a path, `folders` only the
    directories in it, `files` only its last part. Case does not matter."""

    name: str
    anywhere: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


_OTHER_FORMAT = "weights in another format"
_OTHER_SAFETENSORS = "safetensors files that are not part of the checkpoint"

RULES: tuple[Rule, ...] = (
    Rule("version control", anywhere=(".git*",)),
    Rule("a local cache", anywhere=(".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints")),
    Rule(
        "credentials",
        anywhere=(".env", ".env.*", ".netrc", "_netrc", ".ssh", ".aws", ".npmrc", ".pypirc"),
        files=("token", "stored_tokens", "hf_token*", "id_rsa*", "id_ed25519*"),
    ),
    Rule("streammerge's own files", anywhere=("streammerge.json", ".streammerge*")),
    Rule("an adapter", anywhere=("adapter_*",)),
    Rule("a training checkpoint", anywhere=("checkpoint-*", "global_step*")),
    Rule(
        "optimizer or trainer state",
        files=(
            "optimizer*.pt", "optimizer*.pth", "optimizer*.bin", "optimizer*.safetensors", "scheduler.pt", "scaler.pt",
            "rng_state*", "trainer_state.json", "training_args.bin", "pytorch_model_fsdp*", "events.out.tfevents*",
            # DeepSpeed's pointer to its last step, and the script that it drops beside it.
            "latest", "zero_to_fp32.py",
        ),
    ),
    Rule("weights as the authors first published them", anywhere=("consolidated*",), folders=("original",)),
    Rule("an export to another runtime", ("openvino_model*",), folders=("onnx", "openvino", "coreml", "*.mlpackage")),
    Rule(
        _OTHER_FORMAT,
        files=(
            *_TORCH_BIN, "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*", "*.distcp",
            "*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.npz", "*.ot", "*.nemo", "*.pdparams",
            "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.mlmodel", "*.engine",
            "*.gguf", "*.ggml", "*.llamafile",
        ),
    ),
    Rule(_OTHER_SAFETENSORS, files=_SAFETENSORS),
    Rule("checksums or a signature of the base's files", files=("sha256sums*", "*.sha256", "*.sig", "*.sigstore*")),
)  # fmt: skip
"""The deny-list, first match wins."""

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.*", "tekken.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece*.model", "spm*.model", "source.spm", "target.spm", "*.tiktoken", "tiktoken.model", "bpe.codes",
    "dict.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "byte_maps.json",
    "prophetnet.tokenizer",
)  # fmt: skip
"""Files that hold a vocabulary: the `vocab_files_names` of transformers' tokenizer classes (5.23), and mistral's."""
_COMPANIONS = (
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "normalizer.json",
    "emoji.json", "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DOCUMENTS = (
    "*.md", "license", "license.txt", "notice", "notice.txt", "*.sig", "*.sigstore*", "sha256sums*", "*.sha256",
)  # fmt: skip
"""Files that are read by people, or prove what lies beside them."""
_TEMPLATE_FOLDER = "additional_chat_templates"


def is_beside_a_checkpoint(name: str) -> bool:
    """Whether the path `name` means nothing to whoever loads the checkpoint that it lies in: documents, signatures, and
    what clients of the Hub and of git keep."""
    *folders, last = name.split("/")
    return any(_matches(part, (".git*", ".cache")) for part in (*folders, last)) or _matches(last, _DOCUMENTS)


def left_out(name: str) -> tuple[str, str] | None:
    """What of the path `name` (with `/`) the deny-list names, and by which rule: the whole path, or the folder in it
    (with a `/` at the end). None for a sidecar."""
    parts = name.split("/")
    for rule in RULES:
        for depth, part in enumerate(parts[:-1], 1):
            if _matches(part, rule.anywhere + rule.folders):
                return "/".join(parts[:depth]) + "/", rule.name
        if _matches(parts[-1], rule.anywhere + rule.files):
            return name, rule.name
    return None


def left_out_rule(name: str) -> str | None:
    """The rule by which a merged checkpoint does not get the file `name`, None for a sidecar."""
    found = left_out(name)
    return found[1] if found else None


def module_weights(names: Collection[str], modules: Collection[str]) -> frozenset[str]:
    """Weight files that are copied although the deny-list names their kind, because they are parts of their own and
    not another form of the checkpoint: all of those in the folders that modules.json lists (`modules`), and those in
    a folder with a config.json, there the torch files only where there are no safetensors files."""
    components = {dirname(name) for name in names if basename(name) == CONFIG} | set(modules)
    inside = [name for name in names if dirname(name) and dirname(name) in components]
    weights = [name for name in inside if left_out_rule(name) in (_OTHER_FORMAT, _OTHER_SAFETENSORS)]
    kept = {name for name in weights if _matches(basename(name), _SAFETENSORS)}
    preferred = {dirname(name) for name in kept} - set(modules)
    return frozenset(
        kept | {name for name in weights if _matches(basename(name), _TORCH_BIN) and dirname(name) not in preferred}
    )


def module_folders(data: bytes, path: str) -> frozenset[str]:
    """The folders that a sentence-transformers modules.json names, the checkpoint's own left out."""
    # The strict loader wants an object at the top, modules.json has a list there.
    entries = strict_json.loads(b'{"modules":' + data + b"}", path)["modules"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MalformedInputError(path, "it is not a list of modules")
    folders = [entry.get("path", "") for entry in entries]
    if not all(isinstance(folder, str) for folder in folders):
        raise MalformedInputError(path, "a `path` in it is not a string")
    return frozenset(plain_subfolder(folder, path) for folder in folders if folder not in ("", "."))


def plain_subfolder(folder: str, where: str) -> str:
    """`folder` without `.` and empty parts; UnsafeInputError, naming `where` it stands, if it could lead outside."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    if folder.startswith("/") or "\\" in folder or "\0" in folder or ".." in parts or (parts and ":" in parts[0]):
        raise UnsafeInputError(where, f"the subfolder `{folder}` could lead outside")
    return "/".join(parts)


def is_tokenizer_file(name: str) -> bool:
    """Whether the path `name` belongs to the tokenizer at a checkpoint's root, chat templates included."""
    return _matches(name, _VOCABULARIES + _COMPANIONS) or (
        dirname(name) == _TEMPLATE_FOLDER and name.endswith(".jinja")
    )


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether these tokenizer files hold a vocabulary, and so a whole tokenizer."""
    return any(_matches(name, _VOCABULARIES) for name in names)


def _matches(part: str, patterns: tuple[str, ...]) -> bool:
    # A pattern's `*` would match a slash too; parts of a path hold none, whole paths have to be kept from it.
    return "/" not in part and any(fnmatchcase(part.casefold(), pattern) for pattern in patterns)
