import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cluster import cli, memory_plan, preflight
from baton.cluster.checkpoint import INDEX, SINGLE, stored_weights, weight_files

from .test_memory_plan import LLAMA_8B, QWEN3_06B

TINY = {
    **LLAMA_8B,
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
COUNT = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64 + 2 * 100 * 64  # 74,624


def write_config(folder: Path, raw: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def write_header(file: Path, **shapes: tuple[int, ...]) -> None:
    """A safetensors file of zeros; in a name "__" is a dot."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name.replace("__", ".")] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["plan", "memory", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_arithmetic_is_shown_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path, LLAMA_8B)
    shown = plan(capsys, folder, "--memory", "80GiB", "--context", 8192)
    for line in (
        "  embedding       128,256 x 4,096           =    525,336,576",
        "  k and v         32 x 2 x 8 x 128 x 4,096  =    268,435,456",
        "  sum                                       =  8,030,261,248",
        "  8,030,261,248 x 2 B (bfloat16) = 16,060,522,496 B = 15.0 GiB",
        "  a token     32 layers x 2 (K and V) x 8 KV heads x 128 x 2 B (bfloat16) = 131,072 B = 128 KiB",
        "  a sequence  8,192 tokens / 16 = 512 blocks x 2,097,152 B = 1,073,741,824 B = 1.0 GiB",
        "  for KV          77,309,411,328 - 16,060,522,496 weights - 1,073,741,824 workspace = "
        "60,175,147,008 B = 56.0 GiB",
        "  blocks          60,175,147,008 / 2,097,152 = 28,693 blocks x 16 = 459,088 tokens",
        "  sequences       28,693 / 512 = 56 of 8,192 tokens",
    ):
        assert line in shown.splitlines()


def test_a_file_is_as_good_as_its_directory_and_all_gpus_are_shown_when_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path, LLAMA_8B)
    shown = plan(capsys, folder)
    assert shown == plan(capsys, folder / "config.json")
    rows = {line.split()[0]: line for line in shown.split("\n\n")[-1].splitlines()[3:]}
    assert set(rows) == set(memory_plan.GPUS)
    assert rows["h200"].split()[-1] == "6"  # 109.8 GiB / 16 GiB


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path, LLAMA_8B)
    assert "the weights do not fit, 6.1 GiB are missing" in plan(capsys, folder, "--memory", "11GiB")
    assert "= 0 of 131,072 tokens" in plan(capsys, folder, "--gpu", "L4")


def test_ranks_are_shown_beside_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, write_config(tmp_path, LLAMA_8B), "--tp", 16, "--gpu", "h100", "--kv-dtype", "fp8")
    assert "each has 2 heads and 1 KV head, which 2 ranks hold alike" in shown
    assert "|  32 x 2 x 1 x 128 x 4,096  =   33,554,432" in shown
    assert "32 layers x 2 (K and V) x 1 KV head x 128 x 1 B (fp8) = 8,192 B = 8 KiB" in shown
    assert "On each of 16: h100" in shown


def test_weights_that_are_there_are_counted_by_their_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path, TINY)
    assert "no weights here to compare with" in plan(capsys, folder)
    write_header(folder / SINGLE, everything=(COUNT,), model__layers__0__self_attn__rotary_emb__inv_freq=(8,))
    assert f"safetensors headers (1 file): {COUNT:,}, the same" in plan(capsys, folder)
    write_header(folder / SINGLE, everything=(COUNT + 7,))
    shown = plan(capsys, folder, "--tp", 2)
    assert f"7 more, which are taken on every rank: {COUNT + 7:,} in all" in shown
    write_header(folder / SINGLE, everything=(COUNT - 7,))
    shown = plan(capsys, folder)
    assert "7 fewer; the count is taken" in shown
    assert f"  {COUNT:,} x 2 B (bfloat16)" in shown


def test_a_config_of_another_name_is_not_matched_with_the_weights_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_config(tmp_path, TINY) / "config.json").rename(tmp_path / "other.json")
    write_header(tmp_path / SINGLE, a=(7,))
    assert "no weights here" in plan(capsys, tmp_path / "other.json")


def test_an_index_is_enough_and_headers_go_before_it(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(
        json.dumps(
            {"metadata": {"total_size": 2000}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        )
    )
    found = stored_weights(tmp_path, width=2, tied_head=0)
    assert found is not None
    assert (found.count, found.source) == (1000, f"{INDEX} (total_size 2,000 B / 2 B)")
    write_header(tmp_path / "model-1.safetensors", a=(10, 9))
    assert stored_weights(tmp_path, width=2, tied_head=0) == found  # one file is missing
    write_header(tmp_path / "model-2.safetensors", b=(3,))
    write_header(tmp_path / "consolidated.safetensors", a=(93,))  # the same again, in another layout
    found = stored_weights(tmp_path, width=2, tied_head=0)
    assert found is not None
    assert (found.count, found.source) == (93, "safetensors headers (2 files)")
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def test_a_stored_head_is_left_out_when_the_embedding_serves_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path, QWEN3_06B)  # its checkpoint holds both: 751,632,384 weights
    index = {"metadata": {"total_size": 2 * 751_632_384}, "weight_map": {"lm_head.weight": "x.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    assert "less 155,582,464 of a head that the embedding serves as: 596,049,920, the same" in plan(capsys, folder)
    write_header(tmp_path / "x.safetensors", lm_head__weight=(5, 4), other=(3,))
    found = stored_weights(tmp_path, width=2, tied_head=20)
    assert found is not None
    assert found.count == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such"], "no such directory or file"),
        (["{empty}"], "holds no config.json"),
        (["{text}"], "is not JSON"),
        (["{list}"], "holds no JSON object"),
        (["{model}", "--gpu", "h300"], "--gpu is 'h300': write one of b200, h200"),
        (["{model}", "--memory", "much"], "--memory is 'much'"),
        (["{model}", "--tp", "0"], "--tp is 0"),
        (["{model}", "--tp", "3"], "--tp is 3: 4 heads do not split evenly over 3 ranks"),
        (["{model}", "--dtype", "fp8"], "--dtype is 'fp8'"),
        (["{model}", "--kv-dtype", "int4"], "--kv-dtype is 'int4'"),
        (["{model}", "--block-tokens", "24"], "multiple of 16"),
        (["{model}", "--context", "513"], "at most 512 tokens"),
        (["{model}", "--max-model-len", "1024"], "at most 512"),
        (["{torn}"], "is not a whole safetensors file"),
        (["{odd}"], "has no safetensors header"),
    ],
)
def test_a_mistake_is_one_line_and_code_two(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("{")
    (tmp_path / "list").write_text("[]")
    for name in ("model", "torn", "odd"):
        write_config(tmp_path / name, TINY)
    (tmp_path / "torn" / SINGLE).write_bytes(b"0" * 100)
    (tmp_path / "odd" / SINGLE).write_bytes(struct.pack("<Q", 8) + b'{"a": 1}')
    places = {path.name: path for path in tmp_path.iterdir()}
    command = ["plan", "memory", *(text.format(**places) for text in arguments)]
    assert cli.main(command) == cli.EXIT_MISTAKE
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_serve_plans_with_the_same_numbers(tmp_path: Path) -> None:
    from baton.cluster.model_shape import read_shape

    folder = write_config(tmp_path, TINY)
    write_header(folder / SINGLE, everything=(COUNT,))
    write_header(folder / "consolidated.safetensors", everything=(COUNT,))
    size, planned = preflight.measure_model(folder, "auto"), memory_plan.plan_memory(read_shape(TINY))
    assert (size.dtype, size.kv_bytes_per_token) == (planned.dtype, planned.token_bytes)
    assert 0 <= size.weight_bytes - planned.weight_bytes < 200  # the file's header


def test_a_plan_is_made_without_torch(tmp_path: Path) -> None:
    folder = write_config(tmp_path, LLAMA_8B)
    code = (
        "import sys\nfrom baton.cluster import cli\ncli.main(['plan', 'memory', sys.argv[1]])\n"
        "heavy = {'torch', 'ray', 'numpy', 'transformers', 'safetensors', 'grpc', 'huggingface_hub', 'asyncio'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
