"""Which files an output gets besides its weights: copied, replaced, left out by a rule, or refused."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.core.errors import (
    BaseMismatchError,
    CompositionError,
    InputError,
    InputMissingError,
    MalformedInputError,
    UnsafeInputError,
)
from streammerge.planning.sidecars import Sidecar, plan_sidecars

WEIGHTS = ("model.safetensors",)
REPLACED = "replaced by the adapter's tokenizer"
PARTIAL = "adapter 1 brings part of a tokenizer, without a vocabulary"


def write(root, files):
    """A directory with these files, content from name unless given."""
    for name, content in files.items() if isinstance(files, dict) else ((name, name) for name in files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def tokenizer(vocab, added=(), merges=()):
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    return json.dumps({"added_tokens": [{"id": number, "content": "x"} for number in added], "model": model})


def names(plan):
    return [file.name for file in plan.files]


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", ["config.json", "model.safetensors", "README.md"])


def test_everything_that_is_no_weight_is_copied_subfolders_too(tmp_path, base):
    write(tmp_path / "base", ["generation_config.json", "assets/a.png", "modeling_x.py", "sub/helper.py"])
    plan = plan_sidecars(base, WEIGHTS, [], None)
    assert names(plan) == ["README.md", "assets/a.png", "generation_config.json", "modeling_x.py", "sub/helper.py"]
    assert plan.files[1] == Sidecar("assets/a.png", os.path.join(base, "assets/a.png"), "base")
    assert plan.code == ("modeling_x.py", "sub/helper.py")
    assert plan.left_out == ()


def test_weights_config_and_index_are_neither_copied_nor_left_out(tmp_path, base):
    write(tmp_path / "base", ["model.safetensors.index.json"])
    assert names(plan_sidecars(base, WEIGHTS, [], None)) == ["README.md"]


def test_the_index_of_a_torch_base_is_not_reported_as_left_out(tmp_path):
    root = write(tmp_path, ["pytorch_model.bin.index.json", "pytorch_model-1.bin", "tf_model.h5"])
    plan = plan_sidecars(root, ["pytorch_model-1.bin"], [], None)
    assert plan.files == ()
    assert plan.left_out == (("tf_model.h5", "weights in another format"),)


def test_every_file_left_out_is_named_with_its_rule(tmp_path, base):
    write(tmp_path / "base", ["model.fp16.safetensors", "pytorch_model.bin", ".git/a", ".git/b/c", "optimizer.pt"])
    plan = plan_sidecars(base, WEIGHTS, [], None)
    assert names(plan) == ["README.md"]
    assert plan.left_out == (
        (".git/", "version control"),
        ("model.fp16.safetensors", "safetensors files that are not part of the checkpoint"),
        ("optimizer.pt", "optimizer or trainer state"),
        ("pytorch_model.bin", "weights in another format"),
    )


def test_module_weights_that_modules_json_lists_are_copied(tmp_path, base):
    modules = json.dumps([{"path": ""}, {"path": "2_Dense"}])
    write(tmp_path / "base", {"modules.json": modules, "2_Dense/pytorch_model.bin": "d", "3_X/pytorch_model.bin": "x"})
    plan = plan_sidecars(base, WEIGHTS, [], None)
    assert names(plan) == ["2_Dense/pytorch_model.bin", "README.md", "modules.json"]
    assert plan.left_out == (("3_X/pytorch_model.bin", "weights in another format"),)


def test_a_lone_file_has_no_sidecars(tmp_path):
    adapter = write(tmp_path / "adapter", ["tokenizer.json"])
    plan = plan_sidecars(None, ["weights.safetensors"], [adapter], 10)
    assert (plan.files, plan.left_out, plan.code) == ((), (), ())


# --- links ----------------------------------------------------------------------------------------------------------
def test_a_link_inside_the_checkpoint_is_followed(tmp_path, base):
    (tmp_path / "base" / "LICENSE").symlink_to("README.md")
    plan = plan_sidecars(base, WEIGHTS, [], None)
    assert plan.files[0] == Sidecar("LICENSE", os.path.join(base, "README.md"), "base")


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname"])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path, base, target):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base" / "notes.txt").symlink_to(target)
    with pytest.raises(UnsafeInputError, match="leads out of the checkpoint"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_link_through_a_linked_directory_is_refused(tmp_path, base):
    (tmp_path / "outside").mkdir()
    (tmp_path / "base" / "extra").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeInputError, match="leads out of the checkpoint"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_link_to_a_directory_inside_is_refused(tmp_path, base):
    write(tmp_path / "base", ["a/x.txt"])
    (tmp_path / "base" / "b").symlink_to("a")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_link_that_leads_nowhere_is_named(tmp_path, base):
    (tmp_path / "base" / "notes.txt").symlink_to("gone")
    with pytest.raises(InputMissingError, match="notes.txt"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_links_in_a_circle_are_an_error(tmp_path, base):
    (tmp_path / "base" / "a").symlink_to("b")
    (tmp_path / "base" / "b").symlink_to("a")
    with pytest.raises(InputError):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_link_that_the_deny_list_names_is_left_out_unseen(tmp_path, base):
    (tmp_path / "base" / ".cache").symlink_to("/etc")
    assert plan_sidecars(base, WEIGHTS, [], None).left_out == ((".cache", "a local cache"),)


def test_a_fifo_is_refused_without_waiting_for_it(tmp_path, base):
    os.mkfifo(tmp_path / "base" / "notes.txt")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_file_name_that_no_report_could_hold_is_refused(tmp_path, base):
    (tmp_path / "base" / os.fsdecode(b"\xff.txt")).touch()
    with pytest.raises(UnsafeInputError, match="its name is not UTF-8"):
        plan_sidecars(base, WEIGHTS, [], None)


def test_a_checkpoint_named_through_a_link_is_read_like_any_other(tmp_path, base):
    (tmp_path / "link").symlink_to("base")
    assert plan_sidecars(str(tmp_path / "link"), WEIGHTS, [], None) == plan_sidecars(base, WEIGHTS, [], None)


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot as huggingface_hub lays it out, with one blob in the Xet store that repositories share."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    root = repository / "snapshots" / ("0" * 40)
    shared = cache / "blobs" / "ab" / ("ab" + "0" * 62)
    write(cache, {str(shared.relative_to(cache)): "shared", "models--org--name/blobs/e1": "plain"})
    (repository / "blobs" / "e2").symlink_to(f"../../blobs/ab/{shared.name}")
    (root / "sub").mkdir(parents=True)
    (root / "README.md").symlink_to("../../blobs/e1")
    (root / "sub" / "big.txt").symlink_to("../../../blobs/e2")
    return root


def test_the_links_of_the_hub_cache_are_followed(snapshot):
    plan = plan_sidecars(str(snapshot), WEIGHTS, [], None)
    assert names(plan) == ["README.md", "sub/big.txt"]
    assert [os.path.islink(file.path) for file in plan.files] == [False, False]
    assert plan.files[0].path == str(snapshot.parents[1] / "blobs" / "e1")


def test_the_links_of_an_adapter_in_a_subfolder_of_a_snapshot_are_followed(tmp_path, base, snapshot):
    (snapshot / "sub" / "vocab.txt").symlink_to("../../../blobs/e1")
    plan = plan_sidecars(base, WEIGHTS, [str(snapshot / "sub")], None)
    assert Sidecar("vocab.txt", str(snapshot.parents[1] / "blobs" / "e1"), "adapter:0") in plan.files


@pytest.mark.parametrize(
    "target",
    [
        "../../refs/main", "../../../models--org--other/blobs/e1", "../../../token", "../../../blobs/ab/short",
        "../../../blobs/.marker",
    ],
)  # fmt: skip
def test_a_snapshot_reaches_no_other_file_of_the_cache(snapshot, target):
    path = snapshot / "evil.txt"
    write(snapshot, {target: "x"})
    path.symlink_to(target)
    with pytest.raises(UnsafeInputError, match="leads out of the checkpoint"):
        plan_sidecars(str(snapshot), WEIGHTS, [], None)


def test_a_directory_that_only_looks_like_a_cache_gets_no_way_out(tmp_path):
    root = tmp_path / "models--org--name" / "weights" / "v1"
    write(tmp_path, {"models--org--name/blobs/e1": "x"})
    root.mkdir(parents=True)
    (root / "README.md").symlink_to("../../blobs/e1")
    with pytest.raises(UnsafeInputError):
        plan_sidecars(str(root), WEIGHTS, [], None)


# --- the adapter's tokenizer ----------------------------------------------------------------------------------------
def test_a_whole_tokenizer_replaces_all_of_the_bases(tmp_path, base):
    write(tmp_path / "base", ["tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"])
    adapter = write(tmp_path / "lora", ["adapter_config.json", "README.md", "vocab.txt", "tokenizer_config.json"])
    plan = plan_sidecars(base, WEIGHTS, [adapter], None)
    assert [(file.name, file.origin) for file in plan.files] == [
        ("README.md", "base"),
        ("tokenizer_config.json", "adapter:0"),
        ("vocab.txt", "adapter:0"),
    ]
    assert plan.files[2].path == os.path.join(adapter, "vocab.txt")
    replaced = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"]
    assert plan.left_out == tuple((name, REPLACED) for name in replaced)


@pytest.mark.parametrize("part", [["chat_template.jinja"], ["tokenizer_config.json", "special_tokens_map.json"]])
def test_part_of_a_tokenizer_brings_nothing_and_is_listed(tmp_path, base, part):
    write(tmp_path / "base", ["tokenizer.json", "chat_template.jinja"])
    adapter = write(tmp_path / "lora", part)
    plan = plan_sidecars(base, WEIGHTS, [adapter], None)
    assert [(file.name, file.origin) for file in plan.files] == [
        ("README.md", "base"), ("chat_template.jinja", "base"), ("tokenizer.json", "base"),
    ]  # fmt: skip
    assert plan.left_out == tuple((name, PARTIAL) for name in sorted(part))


def test_additional_chat_templates_come_with_the_tokenizer(tmp_path, base):
    write(tmp_path / "base", ["additional_chat_templates/old.jinja"])
    adapter = write(tmp_path / "lora", ["spiece.model", "additional_chat_templates/tool.jinja"])
    plan = plan_sidecars(base, WEIGHTS, [adapter], None)
    assert names(plan) == ["README.md", "additional_chat_templates/tool.jinja", "spiece.model"]
    assert plan.left_out == (("additional_chat_templates/old.jinja", REPLACED),)


def test_two_adapters_with_the_same_tokenizer_are_fine(tmp_path, base):
    adapters = [write(tmp_path / name, ["vocab.txt", "tokenizer_config.json"]) for name in ("a", "b")]
    plan = plan_sidecars(base, WEIGHTS, adapters, None)
    assert [file.origin for file in plan.files] == ["base", "adapter:0", "adapter:0"]


def test_the_tokenizer_of_the_second_adapter_is_taken_if_the_first_has_none(tmp_path, base):
    adapters = [write(tmp_path / "a", ["adapter_config.json"]), write(tmp_path / "b", ["vocab.txt"])]
    assert plan_sidecars(base, WEIGHTS, adapters, None).files[1].origin == "adapter:1"


@pytest.mark.parametrize("other", [{"vocab.txt": "different"}, {"vocab.txt": "vocab.txt", "merges.txt": ""}])
def test_two_adapters_with_different_tokenizers_are_refused(tmp_path, base, other):
    adapters = [write(tmp_path / "a", ["vocab.txt"]), write(tmp_path / "b", other)]
    with pytest.raises(CompositionError, match="two adapters bring different tokenizers") as caught:
        plan_sidecars(base, WEIGHTS, adapters, None)
    assert caught.value.about == (max(other, key=lambda name: name != "vocab.txt"),)


def test_a_link_out_of_the_adapter_is_refused(tmp_path, base):
    (tmp_path / "secret").write_text("secret")
    adapter = write(tmp_path / "lora", ["adapter_config.json"])
    (tmp_path / "lora" / "vocab.txt").symlink_to("../secret")
    with pytest.raises(UnsafeInputError):
        plan_sidecars(base, WEIGHTS, [adapter], None)


# --- its size -------------------------------------------------------------------------------------------------------
SIZED = [
    ({"tokenizer.json": tokenizer({"a": 0, "b": 7})}, 8),
    ({"tokenizer.json": tokenizer({"a": 0}, added=[3, 9])}, 10),
    ({"tokenizer.json": tokenizer({"a": 0, "merges": 4}, merges=[["[", "]"], ['"', "\\"]])}, 5),
    ({"tokenizer.json": tokenizer({"merges": 1, '"merges": [': 2}, merges=["a b", "] c"])}, 3),
    ({"tokenizer.json": json.dumps({"model": {"vocab": [["a", -1.5], ["b", -2.0]]}})}, 2),
    ({"tokenizer.json": tokenizer({"a": 0}), "vocab.json": '{"stale": 99}'}, 1),
    ({"vocab.json": '{"a": 0, "b": 4}', "merges.txt": ""}, 5),
    ({"vocab.txt": "a\nb\nc\n"}, 3),
    ({"vocab.txt": "a\nb\nc"}, 3),
    ({"vocab.txt": "a\nb\n", "added_tokens.json": '{"<x>": 5}'}, 6),
    ({"spiece.model": "binary", "added_tokens.json": '{"<x>": 5}'}, 6),
]


@pytest.mark.parametrize(("files", "size"), SIZED)
def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path, base, files, size):
    adapter = write(tmp_path / "lora", files)
    assert set(files) <= set(names(plan_sidecars(base, WEIGHTS, [adapter], size)))
    with pytest.raises(BaseMismatchError, match=f"has {size} ids, the embedding has {size - 1} rows"):
        plan_sidecars(base, WEIGHTS, [adapter], size - 1)


def test_a_sentencepiece_model_alone_is_not_counted(tmp_path, base):
    adapter = write(tmp_path / "lora", ["spiece.model"])
    assert "spiece.model" in names(plan_sidecars(base, WEIGHTS, [adapter], 1))


def test_the_bases_own_tokenizer_is_not_measured(tmp_path, base):
    write(tmp_path / "base", {"tokenizer.json": tokenizer({"a": 99})})
    assert "tokenizer.json" in names(plan_sidecars(base, WEIGHTS, [], 1))


@pytest.mark.parametrize(
    "content", ["[1]", '{"model": {"vocab": 3}}', '{"added_tokens": {}}', "not json", '{"a": NaN}']
)
def test_a_malformed_tokenizer_is_refused(tmp_path, base, content):
    adapter = write(tmp_path / "lora", {"tokenizer.json": content})
    with pytest.raises(MalformedInputError, match="tokenizer.json"):
        plan_sidecars(base, WEIGHTS, [adapter], 10)


def test_an_unfinished_array_of_merges_is_read_in_one_pass(tmp_path, base):
    adapter = write(tmp_path / "lora", {"tokenizer.json": b'{"merges":["a' * 100_000})
    with pytest.raises(MalformedInputError):
        plan_sidecars(base, WEIGHTS, [adapter], 10)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    vocab=st.dictionaries(st.text(max_size=6), st.integers(0, 10**6), min_size=1, max_size=8),
    merges=st.lists(st.one_of(st.text(max_size=6), st.lists(st.text(max_size=4), max_size=3)), max_size=6),
    indent=st.sampled_from([None, 2]),
)
def test_cutting_the_merges_never_changes_the_count(tmp_path, base, vocab, merges, indent):
    document = {"model": {"vocab": vocab, "merges": merges}}
    adapter = write(tmp_path / "lora", {"tokenizer.json": json.dumps(document, indent=indent).encode()})
    size = max(vocab.values()) + 1
    plan_sidecars(base, WEIGHTS, [adapter], size)
    with pytest.raises(BaseMismatchError, match=f"has {size:,} ids"):
        plan_sidecars(base, WEIGHTS, [adapter], size - 1)
