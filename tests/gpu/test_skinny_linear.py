"""Products against float64, with all that may be folded in; what lies around the tensors is NaN."""

from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels import skinny_linear as skinny_linear_module
from baton.kernels.linear import add_linear, gated_linear, linear
from baton.kernels.skinny_linear import SkinnyWorkspace, skinny_linear, skinny_linear_reference

ROWS = [1, 8, 9, 17, 33, 64, 65, 150]
# Outputs, inputs: less than a tile, parts of tiles, half a chunk, tiles that many thread blocks share; in emulation,
# which has five, runs shorter and longer than the ring.
SHAPES = [(8, 64), (128, 128), (136, 192), (384, 320), (136, 3008), (768, 64), (904, 192), (656, 1088)]
MODEL_SHAPES = [(6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (17200, 192)]


@pytest.fixture(params=["hopper", "elsewhere"])
def kernel(request: pytest.FixtureRequest, random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two that may serve, where the GPU has it."""
    serves = skinny_linear_module._is_hopper(random.device)
    if request.param == "hopper" and not serves:
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(skinny_linear_module, "_is_hopper", lambda device: request.param == "hopper")


def within_nan(*shape: int, random: torch.Generator, scale: float = 1.0) -> Tensor:
    """Random bf16 whose rows lie apart, with NaN between them, in front and behind."""
    count, width = shape if len(shape) == 2 else (1, shape[0])
    memory = torch.full((count + 2, width + 8), float("nan"), dtype=torch.bfloat16, device=random.device)
    values = memory[1:-1, :width]
    values.copy_(torch.randn(count, width, generator=random, device=random.device) * scale)
    return values if len(shape) == 2 else values[0]


def weight_of(outputs: int, inputs: int, random: torch.Generator) -> Tensor:
    """Random bf16 [outputs, inputs] in one run, with NaN in front and behind."""
    memory = torch.full(((outputs + 2) * inputs,), float("nan"), dtype=torch.bfloat16, device=random.device)
    values = memory[inputs:-inputs].view(outputs, inputs)
    values.copy_(torch.randn(outputs, inputs, generator=random, device=random.device))
    return values


def workspace_of(random: torch.Generator) -> SkinnyWorkspace:
    """One that holds NaN, as an earlier launch could have left them."""
    workspace = SkinnyWorkspace(random.device)
    workspace.partial.fill_(float("nan"))
    return workspace


def canvas(rows: int, outputs: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A place for a result, and the memory around it, which a launch must leave as it is."""
    memory = torch.full((rows + 2, outputs + 16), 7.0, dtype=torch.bfloat16, device=random.device)
    return memory[1:-1, 8:-8], memory


def assert_untouched(memory: Tensor) -> None:
    for edge in (memory[0], memory[-1], memory[:, :8], memory[:, -8:]):
        assert bool((edge == 7.0).all())


def assert_close(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """bf16 that is `expected` [T, O] f64, off by `bound` at most, and then rounded once."""
    low, high = (expected - bound).bfloat16(), (expected + bound).bfloat16()
    wrong = ~((low <= found) & (found <= high))  # NaN is neither
    assert not wrong.any(), f"{found[wrong][:8].tolist()} for {expected[wrong][:8].tolist()}"


def slack(x: Tensor, weight: Tensor) -> Tensor:
    """[T, O]: what float32 may lose in a sum of products, of their absolute sum."""
    return (x.double().abs() @ weight.double().abs().T) * 2.0**-20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_right_to_one_rounding(
    rows: int, shape: tuple[int, int], random: torch.Generator, kernel: None
) -> None:
    outputs, inputs = shape
    x, weight = within_nan(rows, inputs, random=random), weight_of(outputs, inputs, random)
    bias = within_nan(outputs, random=random) if rows % 2 else None
    workspace = workspace_of(random)
    out, memory = canvas(rows, outputs, random)
    assert skinny_linear(x, weight, workspace, bias, out=out) is out
    expected = skinny_linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(out, expected, slack(x, weight) + 2.0**-20)
    assert_untouched(memory)
    assert not workspace.arrived.any()


@pytest.mark.parametrize("shape", [(136, 192), (136, 3008), (904, 192)])
@pytest.mark.parametrize("rows", [1, 9, 20, 64, 140])
def test_a_result_is_added_to_what_is_there(
    rows: int, shape: tuple[int, int], random: torch.Generator, kernel: None
) -> None:
    outputs, inputs = shape
    x, weight = within_nan(rows, inputs, random=random), weight_of(outputs, inputs, random)
    bias, workspace = within_nan(outputs, random=random), workspace_of(random)
    stream, memory = canvas(rows, outputs, random)
    stream.copy_(torch.randn(rows, outputs, generator=random, device=random.device) * 20)
    expected = skinny_linear_reference(x.double(), weight.double(), bias.double(), add=stream.double())
    skinny_linear(x, weight, workspace, bias, add=True, out=stream)
    assert_close(stream, expected, slack(x, weight) + stream.double().abs() * 2.0**-20 + 2.0**-20)
    assert_untouched(memory)


@pytest.mark.parametrize("outputs", [8, 72, 136, 456])
@pytest.mark.parametrize("rows", [1, 9, 20, 64, 140])
def test_halves_of_a_result_meet_in_the_gate(rows: int, outputs: int, random: torch.Generator, kernel: None) -> None:
    inputs = 192
    x = within_nan(rows, inputs, random=random, scale=0.3)
    weight = weight_of(2 * outputs, inputs, random)
    bias, workspace = within_nan(2 * outputs, random=random), workspace_of(random)
    out, memory = canvas(rows, outputs, random)
    skinny_linear(x, weight, workspace, bias, gate=True, out=out)
    both = x.double() @ weight.double().T + bias.double()
    gate, up = both[:, :outputs], both[:, outputs:]
    lost = slack(x, weight) + both.abs() * 2.0**-20
    expected = torch.nn.functional.silu(gate) * up
    # silu's slope is 1.1 at most; its fast exponential and division lose a few units in the last place.
    lost = 1.1 * lost[:, :outputs] * up.abs() + gate.abs() * lost[:, outputs:] + expected.abs() * 2.0**-18 + 1e-6
    assert_close(out, expected, lost)
    assert_untouched(memory)


@pytest.mark.parametrize("gate", [False, True])
def test_a_row_is_the_same_bit_for_bit_in_any_company(gate: bool, random: torch.Generator, kernel: None) -> None:
    outputs, inputs = 272, 704
    x, weight = within_nan(300, inputs, random=random), weight_of(outputs, inputs, random)
    bias, workspace = within_nan(outputs, random=random), workspace_of(random)

    def product(chosen: list[int]) -> Tensor:
        return skinny_linear(x[chosen], weight, workspace, bias, gate=gate)

    everything = product(list(range(300)))
    assert torch.equal(product(list(range(300))), everything)  # and from launch to launch
    for chosen in ([0], [299], [5, 3, 5], list(range(90, 100)), list(range(40, 64)), list(range(99, -1, -3))):
        assert torch.equal(product(chosen), everything[chosen]), chosen
    for count in (64, 65, 128, 129):
        assert torch.equal(product(list(range(count))), everything[:count]), count


def test_rows_that_lie_apart_are_read_where_they_lie(random: torch.Generator) -> None:
    inputs = 128
    wide = within_nan(7, 3 * inputs, random=random)
    x, weight = wide[:, inputs : 2 * inputs], weight_of(64, inputs, random)
    found = skinny_linear(x, weight, workspace_of(random))
    assert_close(found, x.double() @ weight.double().T, slack(x, weight))


def test_no_rows_are_no_work(random: torch.Generator) -> None:
    weight = weight_of(64, 128, random)
    found = skinny_linear(torch.empty(0, 128, dtype=weight.dtype, device=weight.device), weight, workspace_of(random))
    assert found.shape == (0, 64)


@pytest.mark.parametrize("op", ["linear", "gated_linear", "add_linear"])
@pytest.mark.parametrize("kind", ["few", "many", "many, invariant", "float32", "odd inputs"])
def test_products_go_to_the_kernel_that_fits_them(
    kind: str, op: str, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[str] = []

    def watched(*arguments: Any, **named: Any) -> Tensor:
        ours.append(kind)
        return skinny_linear(*arguments, **named)

    monkeypatch.setattr("baton.kernels.linear.skinny_linear", watched)
    rows, inputs = 3 if kind == "few" else 65, 200 if kind == "odd inputs" else 192
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    is_invariant, is_skinny = kind != "many", kind in ("few", "many, invariant")
    x, weight = within_nan(rows, inputs, random=random).to(dtype), weight_of(144, inputs, random).to(dtype)
    bias = within_nan(144, random=random).to(dtype)
    stream, workspace = within_nan(rows, 144, random=random).to(dtype), workspace_of(random)
    doubles = (x.double(), weight.double(), bias.double())
    if op == "add_linear":
        expected = skinny_linear_reference(*doubles, add=stream.double())
        found = add_linear(stream, x, weight, bias, workspace=workspace, invariant=is_invariant)
        assert found is stream
    else:
        expected = skinny_linear_reference(*doubles, gate=op == "gated_linear")
        chosen = linear if op == "linear" else gated_linear
        found = chosen(x, weight, bias, workspace=workspace, invariant=is_invariant)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-2
    assert ours == ([kind] if is_skinny else [])


@pytest.mark.parametrize("shape", MODEL_SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_shapes_of_a_model(rows: int, shape: tuple[int, int], random: torch.Generator) -> None:
    outputs, inputs = shape
    x, weight = within_nan(rows, inputs, random=random, scale=inputs**-0.5), weight_of(outputs, inputs, random)
    workspace = workspace_of(random)
    found = skinny_linear(x, weight, workspace)
    for first in range(0, outputs, 8192):  # float64 takes four times the room
        part = weight[first : first + 8192]
        assert_close(found[:, first : first + 8192], x.double() @ part.double().T, slack(x, part))
    gated = skinny_linear(x, weight, workspace, gate=True)
    expected = skinny_linear_reference(x.float(), weight.float(), gate=True)
    assert ((gated.float() - expected).norm() / expected.norm()).item() < 6e-3
    assert not workspace.arrived.any()


def test_a_captured_launch_reads_the_rows_of_its_replay(random: torch.Generator) -> None:
    x, weight, workspace = within_nan(5, 4096, random=random), weight_of(4096, 4096, random), workspace_of(random)
    out = torch.empty(5, 4096, dtype=x.dtype, device=x.device)
    skinny_linear(x, weight, workspace, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        skinny_linear(x, weight, workspace, out=out)
    x.mul_(-2)
    graph.replay()
    assert_close(out, x.double() @ weight.double().T, slack(x, weight))
