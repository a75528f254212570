import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.text import model_source

from .hub import Hub, serve

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "model.safetensors": b"0" * 5000,
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}


def checkpoint(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    return folder


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    assert model_source.resolve(str(folder)) == folder
    assert model_source.served_name(str(folder), folder) == "m"
    assert model_source.is_local(str(folder))


def test_the_bundled_model_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = checkpoint(tmp_path / "models" / model_source.BUNDLED_MODEL)
    assert model_source.resolve(model_source.BUNDLED_MODEL, bundled_folder=tmp_path / "models") == bundled
    with pytest.raises(ConfigError, match="comes with the repository"):
        model_source.resolve(model_source.BUNDLED_MODEL, bundled_folder=tmp_path / "none")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_that_lacks_a_part_is_told_which(tmp_path: Path, missing: str) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=missing.removeprefix("model")):
        model_source.resolve(str(folder))


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no/such", "a/b/c", "a..b/c", "a b", "https://x/y"])
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(name: str) -> None:
    assert model_source.is_local(name)
    with pytest.raises(ConfigError, match="there is no such directory"):
        model_source.resolve(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        model_source.resolve(str(file))


def resolve_elsewhere(name: str, home: Path, endpoint: str, **variables: str) -> str:
    """In a fresh interpreter: huggingface_hub reads its variables when it is imported."""
    code = (
        "import sys\nfrom baton.text import model_source\nfrom baton.core.errors import ConfigError\n"
        "try: print(model_source.resolve(sys.argv[1]))\nexcept ConfigError as error: print('error:', error)"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    command = [sys.executable, "-c", code, name]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return run.stdout.strip()


def test_an_id_is_fetched_once_without_code_and_pickles(tmp_path: Path) -> None:
    with serve(Hub({"someone/small": FILES})) as hub:
        folder = Path(resolve_elsewhere("someone/small", tmp_path, hub.url))
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "model.safetensors",
        }
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        assert not any(name in line for line in hub.asked for name in ("evil", "pytorch_model"))
        hub.asked.clear()
        assert Path(resolve_elsewhere("someone/small", tmp_path, hub.url)) == folder
        assert not any(line.startswith("GET") and "/resolve/" in line for line in hub.asked)
    offline = resolve_elsewhere("someone/small", tmp_path, "http://127.0.0.1:9")
    assert Path(offline) == folder


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with serve(Hub({"someone/gated": FILES}, gated=frozenset({"someone/gated"}))) as hub:
        assert "accept its terms" in resolve_elsewhere("someone/gated", tmp_path, hub.url)
        assert "no such model on the hub" in resolve_elsewhere("someone/nothing", tmp_path, hub.url)


def test_without_a_connection_the_message_says_so(tmp_path: Path) -> None:
    said = resolve_elsewhere("someone/small", tmp_path, "http://127.0.0.1:9")
    assert said.startswith("error: --model someone/small: there is no such directory here, and the hub could not be")
    assert "hub could not be reached" in resolve_elsewhere(
        "someone/small", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1"
    )
