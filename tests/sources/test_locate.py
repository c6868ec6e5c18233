"""What the user typed becomes a path or a Hub id, and never the wrong one of the two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.core.errors import InputError, InputMissingError, MalformedInputError, UnsafeInputError
from streammerge.sources.locate import Location, parse_adapter, parse_base


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory that holds nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("gpt2@main", "gpt2", "main"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None),
        ("org/name@" + "0" * 40, "org/name", "0" * 40),
    ],
)
def test_a_base_that_is_no_path_is_a_hub_id(text, repo, revision):
    assert parse_base(text) == Location(None, repo, revision, None, text)


@pytest.mark.parametrize(
    ("text", "repo", "revision", "subfolder"),
    [
        ("org/name", "org/name", None, None),
        ("org/name@v2", "org/name", "v2", None),
        ("org/name:en/chat", "org/name", None, "en/chat"),
        ("org/name@refs/pr/1:en", "org/name", "refs/pr/1", "en"),
        ("org/name:./en//chat/", "org/name", None, "en/chat"),
    ],
)
def test_an_adapter_that_is_no_path_is_a_hub_id(text, repo, revision, subfolder):
    assert parse_adapter(text) == Location(None, repo, revision, subfolder, text)


@pytest.mark.parametrize("parse", [parse_base, parse_adapter])
def test_an_existing_path_wins_over_a_hub_id(parse, here):
    (here / "org" / "name").mkdir(parents=True)
    assert parse("org/name") == Location("org/name", None, None, None, "org/name")


def test_an_existing_path_wins_even_if_it_reads_like_a_revision_or_a_subfolder(here):
    (here / "org" / "name@main").mkdir(parents=True)
    (here / "org" / "name:en").mkdir()
    assert parse_base("org/name@main").path == "org/name@main"
    assert parse_adapter("org/name:en") == Location("org/name:en", None, None, None, "org/name:en")


def test_a_bare_name_is_a_directory_if_there_is_one(here):
    (here / "gpt2").mkdir()
    assert parse_base("gpt2").path == "gpt2"


def test_a_lone_safetensors_file_is_a_base(here):
    (here / "model.safetensors").touch()
    assert parse_base(str(here / "model.safetensors")).path == str(here / "model.safetensors")


def test_a_file_of_another_kind_is_no_base(here):
    (here / "model.gguf").touch()
    with pytest.raises(MalformedInputError, match="a directory, one `.safetensors` file, or a Hub id"):
        parse_base("model.gguf")


def test_a_file_is_no_adapter_and_the_hint_says_what_is(here):
    (here / "adapter_model.safetensors").touch()
    with pytest.raises(MalformedInputError, match="give the directory that holds the `adapter_config.json`"):
        parse_adapter("adapter_model.safetensors")


def test_a_home_directory_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "base").mkdir()
    assert parse_base("~/base").path == str(here / "base")


@pytest.mark.parametrize("parse", [parse_base, parse_adapter])
@pytest.mark.parametrize(
    "text",
    [
        "./name", "../org/name", "/models/name", "~/name", "a/b/c", "a/b/c/", "org/", "C:\\models", "org\\name",
        "org/model.safetensors", "model.safetensors", "adapter_model.bin", "runs/a@b/c", "",
    ],
)  # fmt: skip
def test_what_looks_like_a_path_never_goes_to_the_hub(parse, text):
    with pytest.raises(InputMissingError):
        parse(text)


@pytest.mark.parametrize("text", ["out/run/5:adapter", "./x:y", "/x:y", "a/b/c:../d"])
def test_a_missing_directory_with_a_subfolder_never_goes_to_the_hub(text):
    with pytest.raises(InputMissingError, match="does not exist"):
        parse_adapter(text)


@pytest.mark.parametrize(
    "text", ["org/na me", "org/-name", "org/a..b", "org/a--b", "org/name.git", "a\0b", "ö/ä", "x" * 97, "a@b@c"]
)
def test_names_that_the_hub_does_not_allow_are_no_hub_ids(text):
    with pytest.raises(InputMissingError):
        parse_base(text)


def test_an_adapter_without_an_owner_is_no_hub_id():
    with pytest.raises(InputMissingError, match="neither an existing path nor a Hub id"):
        parse_adapter("lora")


@pytest.mark.parametrize("text", ["org/name@", "org/name@a b", "org/name@refs/../../x", "org/name@-x"])
def test_an_unusable_revision_is_refused(text):
    with pytest.raises(InputMissingError, match="no usable revision"):
        parse_base(text)


def test_a_subfolder_of_a_directory_is_kept_apart(here):
    (here / "adapters" / "en" / "chat").mkdir(parents=True)
    text = f"{here}/adapters:en/chat"
    assert parse_adapter(text) == Location(f"{here}/adapters", None, None, "en/chat", text)


def test_a_missing_subfolder_of_a_directory_is_named(here):
    (here / "adapters").mkdir()
    with pytest.raises(InputMissingError, match="adapters/de"):
        parse_adapter("adapters:de")


@pytest.mark.parametrize("folder", ["../x", "a/../../x", "/etc", "..", "a\\b"])
def test_a_subfolder_that_leads_outside_is_refused(here, folder):
    (here / "adapters").mkdir()
    for text in (f"adapters:{folder}", f"org/name:{folder}"):
        with pytest.raises(UnsafeInputError, match="could lead outside"):
            parse_adapter(text)


def test_a_drive_is_no_subfolder():
    with pytest.raises(UnsafeInputError, match="could lead outside"):
        parse_adapter("org/name:C:x")


@pytest.mark.parametrize("text", ["org/name:", "adapters:", "adapters:./"])
def test_an_empty_subfolder_is_refused(here, text):
    (here / "adapters").mkdir()
    with pytest.raises(InputMissingError, match="names no subfolder"):
        parse_adapter(text)


@given(st.text(alphabet="ab./:@~\\-_ \0é", max_size=24))
def test_whatever_is_typed_is_a_plain_location_or_a_refusal(text):
    for parse in (parse_base, parse_adapter):
        try:
            location = parse(text)
        except InputError:
            continue
        assert (location.path is None) != (location.repo is None)
        if location.repo:
            assert location.repo.count("/") <= 1
            assert ".." not in location.repo + (location.revision or "")
        assert ".." not in (location.subfolder or "").split("/")
