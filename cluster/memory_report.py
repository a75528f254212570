"""`baton plan memory`: the arithmetic of memory_plan.py, written out line by line."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core.errors import ConfigError
from ..engine.memory import GPU_SHARE, GPU_WORKSPACE
from ..text.model_source import BUNDLED_MODEL, resolve
from .checkpoint import StoredWeights, read_json, stored_weights
from .memory_plan import GPUS, RUNS, WIDTHS, Fit, MemoryPlan, plan_memory
from .model_shape import ModelShape, read_shape
from .units import format_size, parse_choice, parse_int, parse_size

_CONFIG = "config.json"


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan. Raises ConfigError with one line of what to mend."""
    file = _config_file(arguments.model)
    block_tokens = _number("--block-tokens", arguments.block_tokens, 16, 256) or 16
    if block_tokens % 16:
        raise ConfigError(f"--block-tokens is {block_tokens}: write a multiple of 16.")
    dtype = parse_choice("--dtype", arguments.dtype or "auto", ("auto", *RUNS))
    kv_dtype = parse_choice("--kv-dtype", arguments.kv_dtype or "auto", ("auto", *RUNS, "fp8"))
    gpus = _gpus(arguments)
    shape = read_shape(read_json(file))
    plan = plan_memory(
        shape,
        tp=_number("--tp", arguments.tp, 1, 1024) or 1,
        dtype=dtype,
        kv_dtype=kv_dtype,
        block_tokens=block_tokens,
        context=_number("--context", arguments.context, 1),
        max_model_len=_number("--max-model-len", arguments.max_model_len, 16),
        stored=_stored(file, shape),
    )
    named = bool(arguments.gpu or arguments.memory)
    for line in (*_model(plan), "", *_weights(plan), "", *_kv(plan), "", *(_one if named else _table)(plan, gpus)):
        print(line.rstrip())
    return 0


def _number(name: str, text: str | None, low: int, high: int | None = None) -> int | None:
    return None if text is None else parse_int(name, text, low, high)


def _config_file(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / _CONFIG
        if not path.is_file():
            raise ConfigError(f"{model} holds no {_CONFIG}: give a directory with one, or the file itself.")
    elif model == BUNDLED_MODEL and not path.exists():
        path = resolve(model) / _CONFIG
    if not path.is_file():
        raise ConfigError(f"{model}: there is no such directory or file; a plan is made from a {_CONFIG} that is here.")
    return path


def _gpus(arguments: argparse.Namespace) -> dict[str, int]:
    """Memory by name: of those that were asked for."""
    if arguments.memory:
        memory = parse_size("--memory", arguments.memory)
        return {f"GPU of {format_size(memory)}": memory}
    if arguments.gpu:
        name = parse_choice("--gpu", arguments.gpu.lower(), tuple(GPUS))
        return {name: GPUS[name]}
    return GPUS


def _stored(config: Path, shape: ModelShape) -> StoredWeights | None:
    """What lies beside a config.json. A file of another name may stand among the weights of another model."""
    if config.name != _CONFIG:
        return None
    head = shape.vocab_size * shape.hidden_size if shape.tied else 0
    return stored_weights(config.parent, width=WIDTHS.get(shape.dtype, 2), tied_head=head)


def _model(plan: MemoryPlan) -> Iterable[str]:
    shape, attention = plan.shape, plan.shape.attention
    yield f"{shape.architecture}: {attention.num_layers} layers, hidden size {shape.hidden_size:,}, " + (
        f"{attention.num_heads} heads and {attention.num_kv_heads} KV heads of {attention.head_size}, "
        f"context {shape.max_position_embeddings:,}"
    )
    if plan.tp > 1:
        repeated = plan.tp // attention.num_kv_heads
        yield f"Tensor parallel over {plan.tp} ranks: each has {attention.num_heads // plan.tp} heads and " + (
            f"{_kv_heads(plan)}" + (f", which {repeated} ranks hold alike" if repeated > 1 else "")
        )
    if shape.window:
        yield f"It looks back {shape.window:,} tokens in some layers; the pool keeps all tokens in all layers"


def _weights(plan: MemoryPlan) -> Iterable[str]:
    width, split = WIDTHS[plan.dtype], plan.tp > 1
    whole = [(weight.name, _product(weight.factors), "=", f"{weight.count:,}") for weight in plan.weights]
    rank = [("|", _product(weight.rank_factors), "=", f"{weight.rank_count:,}") for weight in plan.weights]
    whole = [("", "in all", "", ""), *whole, ("sum", "", "=", f"{plan.counted:,}")]
    rank = [("|", "each rank", "", ""), *rank, ("|", "", "=", f"{plan.rank_counted:,}")]
    yield "Weights, counted from config.json"
    if split:
        yield from _columns([(*left, *right) for left, right in zip(whole, rank, strict=True)], right=(3, 7))
    else:
        yield from _columns(whole[1:], right=(3,))
    yield f"  {_source(plan)}"
    yield f"  {'in all     ' if split else ''}{_bytes(plan.parameters, width, plan.dtype)}"
    if split:
        yield f"  each rank  {_bytes(plan.rank_parameters, width, plan.dtype)}"


def _source(plan: MemoryPlan) -> str:
    if plan.stored is None:
        return "no weights here to compare with"
    difference = plan.stored.count - plan.counted
    if difference == 0:
        verdict = "the same"
    elif difference > 0:
        where = "taken on every rank" if plan.tp > 1 else "taken"
        verdict = f"{difference:,} more, which are {where}: {plan.parameters:,} in all"
    else:
        verdict = f"{-difference:,} fewer; the count is taken"
    return f"{plan.stored.source}: {plan.stored.count:,}, {verdict}"


def _kv(plan: MemoryPlan) -> Iterable[str]:
    attention, width = plan.shape.attention, WIDTHS[plan.kv_dtype]
    yield f"KV cache{', each rank' if plan.tp > 1 else ''}"
    yield (
        f"  a token     {attention.num_layers} layers x 2 (K and V) x {_kv_heads(plan)} x "
        f"{attention.head_size} x {width} B ({plan.kv_dtype}) = {_size(plan.token_bytes)}"
    )
    yield f"  a block     {plan.block_tokens} tokens x {plan.token_bytes:,} B = {_size(plan.block_bytes)}"
    yield (
        f"  a sequence  {plan.context:,} tokens / {plan.block_tokens} = {plan.sequence_blocks:,} blocks x "
        f"{plan.block_bytes:,} B = {_size(plan.sequence_bytes)}"
    )


def _one(plan: MemoryPlan, gpus: dict[str, int]) -> Iterable[str]:
    for name, memory in gpus.items():
        fit = plan.fit(memory)
        yield f"On {name}" if plan.tp == 1 else f"On each of {plan.tp}: {name}"
        yield f"  a worker takes  {memory:,} B x {GPU_SHARE} = {_size(fit.usable)}"
        rest = f"{fit.usable:,} - {plan.weight_bytes:,} weights - {GPU_WORKSPACE:,} workspace"
        if fit.room < 0:
            yield f"  for KV          {rest} < 0: the weights do not fit, {format_size(-fit.room)} are missing"
            return
        yield f"  for KV          {rest} = {_size(fit.room)}"
        yield (
            f"  blocks          {fit.room:,} / {plan.block_bytes:,} = {fit.blocks:,} blocks "
            f"x {plan.block_tokens} = {fit.tokens:,} tokens"
        )
        each = f"{plan.sequence_blocks:,} = {fit.sequences:,} of {plan.context:,} tokens"
        yield f"  sequences       {fit.blocks:,} / {each}"


def _table(plan: MemoryPlan, gpus: dict[str, int]) -> Iterable[str]:
    yield f"Sequences of {plan.context:,} tokens on {'one GPU' if plan.tp == 1 else f'{plan.tp} GPUs'}"
    yield f"  for KV = memory x {GPU_SHARE} - {format_size(plan.weight_bytes)} weights - " + (
        f"{format_size(GPU_WORKSPACE)} workspace; sequences = (for KV / {format_size(plan.block_bytes)} a block) "
        f"/ {plan.sequence_blocks:,} blocks"
    )
    header = ("GPU", "memory", "for KV", "tokens", "sequences")
    rows = [(name, format_size(memory), *_cells(plan.fit(memory))) for name, memory in gpus.items()]
    yield from _columns([header, *rows], right=(1, 2, 3, 4))


def _cells(fit: Fit) -> tuple[str, str, str]:
    if fit.room < 0:
        return "weights do not fit", "-", "-"
    return format_size(fit.room), f"{fit.tokens:,}", f"{fit.sequences:,}"


def _kv_heads(plan: MemoryPlan) -> str:
    return f"{plan.rank_kv_heads} KV head{'s' * (plan.rank_kv_heads > 1)}"


def _product(factors: tuple[int, ...]) -> str:
    return " x ".join(f"{factor:,}" for factor in factors)


def _bytes(count: int, width: int, dtype: str) -> str:
    return f"{count:,} x {width} B ({dtype}) = {_size(count * width)}"


def _size(num_bytes: int) -> str:
    """Exact, and as people say it."""
    return f"{num_bytes:,} B" + (f" = {format_size(num_bytes)}" if num_bytes >= 1024 else "")


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  " + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width) for column, (cell, width) in enumerate(cells)
        )
