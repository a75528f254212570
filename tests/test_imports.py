"""Who may import whom: the table of CONTRIBUTING.md, held. `if TYPE_CHECKING` imports count."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = {"core", "wire", "observe", "engine", "kv_transfer", "v1", "worker"}
MAY = {
    "core": {"core"},
    "kernels": {"kernels"},
    "observe": {"observe", "core"},
    "wire": {"wire", "core", "observe", "v1"},
    "text": {"text", "core"},
    "engine": {"engine", "core", "kernels"},
    "kv_transfer": {"kv_transfer", "core", "kernels"},
    "router": {"router", "core", "text", "wire", "observe", "v1"},
    "worker": WORKER,
    "prefill_worker": WORKER | {"prefill_worker"},
    "decode_worker": WORKER | {"decode_worker"},
    "colocated_worker": WORKER | {"colocated_worker"},
    "client": {"client", "core", "text", "engine", "v1"},
}
"""Our folders that each folder may import. cluster/ may import all; nobody may import it."""

NEVER = {
    "core": {"torch", "ray", "grpc", "google", "redis", "numpy", "transformers"},
    "kernels": {"ray", "grpc", "google", "redis", "transformers"},
    "observe": {"torch", "ray", "transformers"},
    "wire": {"torch", "ray", "transformers"},
    "text": {"torch", "ray", "transformers", "grpc"},
    "engine": {"ray", "grpc", "google", "redis", "opentelemetry", "prometheus_client"},
    "kv_transfer": {"grpc", "google", "redis"},
    "router": {"torch", "ray", "transformers"},
    "worker": {"transformers"},
    "prefill_worker": {"transformers"},
    "decode_worker": {"transformers"},
    "colocated_worker": {"transformers"},
    "client": {"torch", "ray", "transformers", "redis", "opentelemetry", "prometheus_client"},
}
"""Packages of others that must not appear in a folder."""


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[tuple[str, str]]:
    """("ours", folder) and ("theirs", package) for each import anywhere in the file."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {named(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(named((node.module or "").split(".")))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)]
            parts = [*base, *(node.module or "").split(".")] if node.module else list(base)
            # `from .. import x` names folders; at the root itself it names what __init__.py defines.
            names = [parts] if parts else [[alias.name] for alias in node.names]
            found |= {("ours", name[0]) for name in names if (ROOT / name[0]).is_dir() or name[0] == "v1"}
    return found


def named(parts: list[str]) -> tuple[str, str]:
    return ("ours", parts[1] if len(parts) > 1 else "") if parts[0] == "baton" else ("theirs", parts[0])


@pytest.mark.parametrize("folder", sorted(MAY))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    assert files(folder)
    for path in files(folder):
        ours = {name for kind, name in imported(path) if kind == "ours"}
        theirs = {name for kind, name in imported(path) if kind == "theirs"}
        assert ours <= MAY[folder], f"{path.relative_to(ROOT)} imports {ours - MAY[folder]}"
        assert not theirs & NEVER[folder], f"{path.relative_to(ROOT)} imports {theirs & NEVER[folder]}"


def test_every_folder_of_code_has_a_rule() -> None:
    packages = {path.name for path in (ROOT / "src" / "baton").iterdir() if path.is_dir()}
    assert packages - set(MAY) == {"cluster", "protos", "v1"}


def test_the_experimental_part_of_ray_stays_behind_one_file() -> None:
    allowed = {Path("kv_transfer/ray_direct.py")}
    for folder in MAY:
        for path in files(folder):
            assert path.relative_to(ROOT) in allowed or "ray.experimental" not in path.read_text(), path


def test_imports_between_our_folders_are_relative() -> None:
    for folder in [*MAY, "cluster"]:
        for path in files(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                absolute = (
                    isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("baton")
                )
                assert not absolute, f"{path.relative_to(ROOT)}:{node.lineno}"


def loaded_by(statement: str, *, path: list[str] | None = None) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*(path or []), str(ROOT / "src")])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_router_loads_neither_torch_nor_ray_nor_transformers() -> None:
    loaded = loaded_by("import baton.router.__main__")
    assert "grpc" in loaded
    assert not loaded & {"torch", "ray", "transformers", "numpy"}


def test_transformers_can_be_imported_with_the_repository_first_on_the_path() -> None:
    """It looks for a package named `kernels` and imports it: ours must run no code then, and have no version."""
    loaded_by("from transformers import LlamaForCausalLM", path=[str(ROOT)])
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("command", [["serve"], ["plan", "memory"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    ask = [*command, "--help"]
    loaded = loaded_by(f"import baton.cluster.cli as cli\ntry: cli.main({ask})\nexcept SystemExit: pass")
    heavy = {"torch", "ray", "transformers", "numpy", "grpc", "google", "redis", "yaml", "huggingface_hub", "asyncio"}
    assert not loaded & heavy


def test_the_package_itself_loads_nothing_until_a_name_is_asked_for() -> None:
    assert "grpc" not in loaded_by("import baton")
    assert "grpc" in loaded_by("import baton; baton.InferenceClient")


@pytest.mark.parametrize("statement", ["import baton.client", "from baton import SamplingParams"])
def test_the_client_loads_only_grpc_and_core(statement: str) -> None:
    loaded = loaded_by(statement)
    assert not loaded & {"torch", "ray", "transformers", "redis", "opentelemetry", "tokenizers", "jinja2", "numpy"}


def test_only_the_in_process_part_of_the_client_knows_engines() -> None:
    """And only `LLM` knows text: the two clients stay as light as they are."""
    engine, text = {"in_process.py"}, {"by_address.py", "in_process.py", "jobs.py", "llm.py"}
    for path in files("client"):
        ours = {name for kind, name in imported(path) if kind == "ours"}
        assert "engine" not in ours or path.name in engine, path.name
        assert "text" not in ours or path.name in text, path.name


def test_running_an_engine_in_this_process_loads_nothing_of_a_cluster() -> None:
    loaded = loaded_by("import baton.client.in_process")
    assert "torch" in loaded
    assert not loaded & {"ray", "redis", "opentelemetry", "starlette", "transformers"}


def test_asking_a_cluster_for_a_list_of_prompts_loads_no_engine() -> None:
    assert not loaded_by("from baton import LLM") & {"torch", "ray", "transformers", "numpy", "tokenizers", "redis"}
