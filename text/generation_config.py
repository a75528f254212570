"""What the model's author says about generation: ends of sequence and sampling defaults.

Read as vLLM reads it: the sampling values of generation_config.json are the defaults of a request, and `do_sample` is
not looked at. A file that says `"do_sample": false` beside no temperature therefore samples at 1.0; who wants greedy
answers asks for temperature 0.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import ConfigError
from .model_files import read_object, token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Defaults of one model's requests, settled: what no file names has the value of the field here."""

    eos_token_ids: frozenset[int] = frozenset()
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # None: what the context leaves

    @classmethod
    def from_dir(cls, path: Path) -> "GenerationDefaults":
        """Read generation_config.json, and config.json for ends of sequence where the first names none.

        Add the tokenizer's own end of sequence with `ending_also_with`: it ends an answer too.
        Raises ConfigError when a value is not of its kind or out of its range.
        """
        file = path / "generation_config.json"
        values = read_object(file)
        eos = token_ids(values.get("eos_token_id"), file, "eos_token_id")
        if not eos:
            config = path / "config.json"
            eos = token_ids(read_object(config).get("eos_token_id"), config, "eos_token_id")
        top_k = _number(values, "top_k", 0, low=-1, high=2**31 - 1, file=file)
        max_new_tokens = _number(values, "max_new_tokens", 0, low=0, high=2**31 - 1, file=file)
        return cls(
            eos_token_ids=frozenset(eos),
            temperature=_number(values, "temperature", 1.0, low=0.0, high=1e6, file=file),
            top_p=_number(values, "top_p", 1.0, low=1e-9, high=1.0, file=file),
            top_k=max(0, int(top_k)),  # -1 too means all tokens
            min_p=_number(values, "min_p", 0.0, low=0.0, high=1.0, file=file),
            repetition_penalty=_number(values, "repetition_penalty", 1.0, low=1e-9, high=2.0, file=file),
            max_new_tokens=int(max_new_tokens) or None,
        )

    def ending_also_with(self, token_id: int | None) -> "GenerationDefaults":
        return self if token_id is None else replace(self, eos_token_ids=self.eos_token_ids | {token_id})


def _number(values: dict[str, object], key: str, default: float, *, low: float, high: float, file: Path) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{file}: {key} must be a number from {low:g} to {high:g}, not {value!r}")
    return value
