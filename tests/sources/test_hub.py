"""The real Hub client against a server on the loopback interface: what is fetched, from where, and what is said."""

from __future__ import annotations

import json

import pytest

from tests.sources.fake_hub import FakeHub, Fault, ask

SHARDS = {"model-00001-of-00002.safetensors": b"first shard", "model-00002-of-00002.safetensors": b"second shard"}
INDEX = json.dumps({"metadata": {"total_size": 2}, "weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
SIDECARS = {"config.json": b"{}", "tokenizer.json": b"{ }", "README.md": b"read me", "extra/notes.txt": b"notes"}
BASE = {**SIDECARS, "model.safetensors.index.json": INDEX, **SHARDS}
OTHER_WEIGHTS = {
    "pytorch_model.bin": b"bin",
    "tf_model.h5": b"h5",
    "model.fp16.safetensors": b"variant",
    "original/consolidated.00.pth": b"original",
    "onnx/model.onnx": b"onnx",
    "q4.gguf": b"gguf",
    "optimizer.pt": b"optimizer",
    ".gitattributes": b"git",
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"factors"}
TOKENIZER = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}
TOKEN = "hf_CanaryCanaryCanaryCanaryCanary"


@pytest.fixture
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "hf"


def test_a_sharded_base_is_fetched_without_other_weights(hub, home):
    commit = hub.commit("org/base", {**BASE, **OTHER_WEIGHTS})
    got = ask("base", "org/base", hub.url, home)
    assert got.files == BASE
    assert got.data["identity"] == f"org/base@{commit}"
    assert hub.downloaded() == set(BASE)


def test_torch_weights_are_fetched_only_where_there_are_no_safetensors(hub, home):
    files = {"config.json": b"{}", "pytorch_model.bin": b"weights", "model.onnx": b"onnx"}
    hub.commit("org/old", files)
    assert set(ask("base", "org/old", hub.url, home).files) == {"config.json", "pytorch_model.bin"}


def test_module_weights_that_modules_json_lists_are_fetched(hub, home):
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]).encode()
    files = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "modules.json": modules,
        "1_Pooling/config.json": b"{}",
        "2_Dense/pytorch_model.bin": b"dense",
    }
    hub.commit("org/st", {**files, "3_Other/pytorch_model.bin": b"not listed"})
    assert ask("base", "org/st", hub.url, home).files == files


def test_names_that_read_like_patterns_are_taken_literally(hub, home):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "a[1].txt": b"1", "b*.txt": b"2"}
    hub.commit("org/base", {**files, "bad.bin": b"", "a1.bin": b""})
    assert ask("base", "org/base", hub.url, home).files == files


def test_a_revision_is_fetched_at_its_commit(hub, home):
    hub.commit("org/base", {"config.json": b"{}", "model.safetensors": b"new"})
    old = hub.commit("org/base", {"config.json": b"{}", "model.safetensors": b"old"}, "v1")
    for revision in ("v1", old):
        got = ask("base", f"org/base@{revision}", hub.url, home)
        assert got.files["model.safetensors"] == b"old"
        assert got.data["identity"] == f"org/base@{old}"


def test_a_name_without_an_owner_is_fetched(hub, home):
    hub.commit("gpt2", {"config.json": b"{}", "model.safetensors": b"weights"})
    assert ask("base", "gpt2", hub.url, home).files["model.safetensors"] == b"weights"


def test_an_index_that_names_a_missing_shard_stops_before_the_weights(hub, home):
    hub.commit("org/base", {name: data for name, data in BASE.items() if "00002-of" not in name})
    got = ask("base", "org/base", hub.url, home)
    assert got.data["error"] == "MalformedInputError"
    assert "model-00002-of-00002.safetensors" in got.data["text"]
    assert not hub.downloaded() & set(SHARDS)


def test_an_index_beside_another_model_file_is_refused_before_the_weights(hub, home):
    hub.commit("org/base", {**BASE, "model.safetensors": b"whole"})
    got = ask("base", "org/base", hub.url, home)
    assert (got.data["error"], "two checkpoints" in got.data["text"]) == ("MalformedInputError", True)
    assert not hub.downloaded() & set(SHARDS)


def test_a_shard_name_that_leads_outside_is_refused(hub, home):
    hub.commit("org/base", {**BASE, "model.safetensors.index.json": INDEX.replace(b"model-00001", b"../model-00001")})
    assert ask("base", "org/base", hub.url, home).data["error"] == "UnsafeInputError"


def test_a_branch_that_moves_meanwhile_is_not_fetched_half_and_half(hub, home):
    hub.commit("org/base", BASE)

    def move_after_the_listing(path):
        if path.startswith("/api/models/org/base/tree/"):
            hub.commit("org/base", {**BASE, "README.md": b"moved"})

    hub.on_request = move_after_the_listing
    got = ask("base", "org/base", hub.url, home)
    assert "`main` moved to another commit" in got.data["message"]
    assert not hub.downloaded() & set(SHARDS)
    assert ask("base", "org/base", hub.url, home).files["README.md"] == b"moved"


def test_an_adapter_given_as_a_base_is_named_as_such(hub, home):
    hub.commit("org/lora", ADAPTER)
    got = ask("base", "org/lora", hub.url, home)
    assert "is an adapter, not a base" in got.data["text"]
    assert got.data["exit_code"] == 3


def test_an_adapter_comes_with_its_tokenizer_and_the_configs_of_its_neighbours(hub, home):
    neighbour = {f"de/{name}": data for name, data in ADAPTER.items()}
    checkpoint = {f"checkpoint-5/{name}": data for name, data in {**ADAPTER, "optimizer.pt": b"state"}.items()}
    hub.commit(
        "org/lora", {**ADAPTER, **TOKENIZER, **neighbour, **checkpoint, "README.md": b"", "training_args.bin": b""}
    )
    got = ask("adapter", "org/lora", hub.url, home)
    configs = {"de/adapter_config.json": b"{}", "checkpoint-5/adapter_config.json": b"{}"}
    assert got.files == {**ADAPTER, **TOKENIZER, **configs}


def test_an_adapter_in_a_subfolder_is_fetched_alone(hub, home):
    files = {f"{folder}/{name}": data for folder in ("en", "de") for name, data in {**ADAPTER, **TOKENIZER}.items()}
    commit = hub.commit("org/lora", files)
    got = ask("adapter", "org/lora:en", hub.url, home)
    assert set(got.files) == {name for name in files if name.startswith("en/")}
    assert got.data["identity"] == f"org/lora@{commit}:en"


def test_an_adapter_with_torch_weights_only_is_fetched(hub, home):
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"factors"}
    hub.commit("org/lora", files)
    assert ask("adapter", "org/lora", hub.url, home).files == files


def test_several_adapters_and_none_at_the_root_are_listed(hub, home):
    hub.commit("org/lora", {f"{folder}/{name}": data for folder in ("en", "de") for name, data in ADAPTER.items()})
    text = ask("adapter", "org/lora", hub.url, home).data["text"]
    assert "no adapter at its root; its subfolders with one: `de`, `en`" in text
    assert "hint: name one of them: `org/lora:de`" in text


@pytest.mark.parametrize(
    ("status", "headers", "reason", "hint"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "authors restrict access", "HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, "no such repository, or it is private", "HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository", "check the name"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no branch, tag or commit `main`", "revisions"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "access to it is disabled", ""),
        (403, {}, "access is refused (status 403)", "HF_TOKEN"),
        (500, {}, "answered with status 500, and `main` is not in the local cache", "connect to the Hub"),
        (0, {}, "the connection failed", "connect to the Hub"),
    ],
)
def test_what_the_hub_answers_becomes_one_line_and_a_hint_without_the_token(hub, home, status, headers, reason, hint):
    hub.commit("org/base", BASE)
    hub.faults = [Fault("/api/", status, headers)]
    got = ask("base", "org/base", hub.url, home, HF_TOKEN=TOKEN)
    assert f"Bearer {TOKEN}" in hub.tokens
    assert got.data["error"] == "HubError"
    assert reason in got.data["message"]
    assert hint in got.data["advice"]
    assert TOKEN not in json.dumps(got.data) + got.stderr


def test_a_repository_that_does_not_exist_is_said_so(hub, home):
    got = ask("adapter", "org/nothing", hub.url, home)
    assert "cannot get `org/nothing` from the Hub: no such repository" in got.data["message"]


def test_a_gated_file_is_said_so_even_where_the_listing_is_open(hub, home):
    hub.commit("org/base", BASE)
    hub.faults = [Fault("/resolve/", 403, {"X-Error-Code": "GatedRepo"})]
    got = ask("base", "org/base", hub.url, home)
    assert "its authors restrict access" in got.data["message"]


def test_a_cut_download_is_an_error_and_the_next_run_fetches_the_rest(hub, home):
    hub.commit("org/base", BASE)
    hub.faults = [Fault("00002-of", 0)]
    got = ask("base", "org/base", hub.url, home, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert got.data["error"] == "HubError"
    assert "run the same command again" in got.data["advice"]
    # The client fetches several files at a time: which of them were whole when it gave up is a matter of chance.
    whole = {name for name in BASE for path in home.rglob(f"snapshots/*/{name}") if path.is_file()}
    assert {"config.json", "model.safetensors.index.json"} <= whole < set(BASE)
    hub.faults = []
    hub.requests.clear()
    assert ask("base", "org/base", hub.url, home).files == BASE
    assert "model-00002-of-00002.safetensors" in hub.downloaded()
    assert not hub.downloaded() & whole


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_offline_the_cached_snapshot_is_taken(hub, home, kind):
    files = BASE if kind == "base" else {**ADAPTER, **TOKENIZER, "config.json": b"{}"}
    hub.commit("org/it", {**files, "model.gguf": b"never fetched"})
    online = ask(kind, "org/it", hub.url, home)
    hub.stop()
    unreachable = ask(kind, "org/it", hub.url, home)
    offline = ask(kind, "org/it", hub.url, home, HF_HUB_OFFLINE="1")
    assert online.data == unreachable.data == offline.data
    assert set(offline.files) == (set(files) if kind == "base" else {*ADAPTER, *TOKENIZER})


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "README.md"])
def test_offline_an_incomplete_snapshot_is_refused_and_the_missing_file_named(hub, home, lost):
    hub.commit("org/base", BASE)
    path = home / ask("base", "org/base", hub.url, home).data["path"] / lost
    path.unlink()
    got = ask("base", "org/base", hub.url, home, HF_HUB_OFFLINE="1")
    assert got.data["error"] == "HubError"
    assert f"the cached snapshot lacks `{lost}`" in got.data["message"]


def test_offline_without_a_remembered_listing_the_index_tells_what_is_missing(hub, home):
    commit = hub.commit("org/base", BASE)
    path = home / ask("base", "org/base", hub.url, home).data["path"]
    (path.parents[1] / "trees" / f"{commit}.json").unlink()
    assert ask("base", "org/base", hub.url, home, HF_HUB_OFFLINE="1").files == BASE
    (path / "model-00001-of-00002.safetensors").unlink()
    message = ask("base", "org/base", hub.url, home, HF_HUB_OFFLINE="1").data["message"]
    assert "`model-00001-of-00002.safetensors`" in message


def test_offline_and_never_fetched_says_how_to_get_it(hub, home):
    got = ask("base", "org/base", hub.url, home, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to ask it, and `main` is not in the local cache" in got.data["message"]
    assert "without HF_HUB_OFFLINE" in got.data["advice"]
    assert hub.requests == []


def test_quiet_shows_no_bars_and_leaves_the_clients_switch_as_it_was(hub, home):
    hub.commit("org/base", BASE)
    quiet = ask("base", "org/base", hub.url, home)
    loud = ask("base", "org/base", hub.url, home.parent / "other", quiet=False)
    assert "%|" not in quiet.stderr
    assert "%|" in loud.stderr
    assert quiet.data["bars_disabled_after"] is False
