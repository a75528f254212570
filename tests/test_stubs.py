"""The committed stubs are those that the protos give, and the protos are clean."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "protos" / "baton" / "v1"
MADE_WITH = "1.85.1"


def test_the_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs the dev extra")
    version = importlib.metadata.version("grpcio-tools")
    assert version == MADE_WITH, f"stubs are made with grpcio-tools {MADE_WITH}, here is {version}"
    protos = [str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("*.proto"))]
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *out, *protos], cwd=ROOT, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "baton" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in FOLDER.glob("*_pb2*.py*")}
    assert made.keys() == committed.keys()
    stale = [name for name in made if made[name] != committed[name]]
    assert not stale, f"run `make protos`: {stale}"


def test_the_protos_pass_buf_lint() -> None:
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        pytest.skip("needs the dev extra")
    run = subprocess.run([str(buf), "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
