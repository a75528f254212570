"""What `baton serve` is told: flags > environment (BATON_*) > baton.yaml > the defaults here.

One table, `SETTINGS`, names each setting once; flags, variables, keys of the file and `ServeConfig` follow from it.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from ..core.errors import ConfigError
from ..engine.policies import DEFAULT_POLICY, POLICIES
from ..text.model_source import BUNDLED_MODEL
from .units import parse_choice, parse_int, parse_port, parse_size, parse_text

DEFAULT_ADDRESS = "127.0.0.1:50051"  # of the router, where a cluster is asked
DEFAULT_FILE = "baton.yaml"
PREFIX = "BATON_"
TRANSPORTS = ("auto", "mapped", "ray_store")  # those of kv_transfer/capability.py, which loads too much for a --help
# Variables that other commands and processes of ours read.
_OTHER_VARIABLES = frozenset({"BATON_ADDRESS", "BATON_API_KEY", "BATON_CONFIG"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """One cluster on this machine. `None` stands for: found out at start."""

    model: str = BUNDLED_MODEL
    served_name: str | None = None
    prefill: int = 1
    decode: int = 1
    both: int = 0
    tp: int = 1
    prefill_tp: int | None = None  # None, here and below: as all workers
    prefill_block_tokens: int | None = None
    prefill_dtype: str | None = None
    max_model_len: int | None = None  # tokens; None: what the model allows
    kv_memory: int | None = None  # bytes of each worker, in all its ranks; None: from what is free
    swap_memory: int | None = None  # bytes of each worker that decodes; None: from what is free
    max_batch: int = 32
    step_tokens: int = 512
    policy: str = DEFAULT_POLICY
    block_tokens: int = 16
    transport: str = "auto"
    kv_checksums: bool = True
    dtype: str = "auto"
    device: str = "auto"
    deterministic: bool = False  # logits do not depend on what else runs, to the last bit
    threads: int = 1  # of each rank: more than the machine has cores makes each step several times slower
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_port: int = 8000
    metrics_port: int = 9400
    redis_url: str | None = field(default=None, repr=False)
    cluster_name: str = "baton"
    api_keys_file: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cluster_token: str | None = field(default=None, repr=False)
    tls_cert: str | None = None
    tls_key: str | None = None
    otlp_endpoint: str | None = None
    log_format: str = "console"
    log_level: str = "info"
    drain_s: int = 10  # how long Ctrl-C waits for running requests
    start_s: int = 300  # how long the cluster may take to become ready

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.both

    def tp_of(self, role: str) -> int:
        return self.prefill_tp or self.tp if role == "prefill" else self.tp

    def block_tokens_of(self, role: str) -> int:
        return self.prefill_block_tokens or self.block_tokens if role == "prefill" else self.block_tokens

    @property
    def most_tp(self) -> int:
        """Ranks of the worker that has most."""
        return max(self.tp, self.tp_of("prefill")) if self.prefill else self.tp

    @property
    def num_ranks(self) -> int:
        """Of all workers."""
        return self.prefill * self.tp_of("prefill") + (self.num_workers - self.prefill) * self.tp

    @property
    def num_decoding(self) -> int:
        """Workers that write answers, and so may preempt some of them."""
        return self.decode + self.both


@dataclass(frozen=True, slots=True)
class Setting:
    """How one field of `ServeConfig` is written. A secret has no flag (`ps` shows flags) and no key in the file."""

    name: str
    parse: Callable[[str, object], object]
    help: str
    metavar: str = "TEXT"
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def _count(low: int, high: int | None = None) -> Callable[[str, object], int]:
    return partial(parse_int, low=low, high=high)


def _block_tokens(name: str, text: object) -> int:
    try:
        value = parse_int(name, text, 16, 256)
    except ConfigError:
        value = 0
    if value == 0 or value % 16:
        raise ConfigError(f"{name} is {text}: write a multiple of 16 from 16 to 256.")
    return value


def _one_of(*choices: str) -> Callable[[str, object], str]:
    return partial(parse_choice, choices=choices)


def _switch(name: str, text: object) -> bool:
    if isinstance(text, bool):  # YAML reads on and off so
        return text
    return parse_choice(name, text, choices=("on", "off")) == "on"


def _keys(name: str, text: object) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in str(text).split(",") if key.strip())
    if not keys:
        raise ConfigError(f"{name} holds no key: write one or more, with commas between them.")
    return keys


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "model", parse_text, "directory or Hugging Face id of a Llama, Mistral, Mixtral or Qwen checkpoint", "PATH|ID"
    ),
    Setting("served_name", parse_text, "name that clients call the model by (default: its directory's)", "NAME"),
    Setting("prefill", _count(0, 64), "prefill workers, which read prompts (default: 1, with --both 0)", "N"),
    Setting("decode", _count(0, 64), "decode workers, which write answers (default: 1, with --both 0)", "N"),
    Setting("both", _count(0, 64), "workers that do both, for light loads (default: 0)", "N"),
    Setting(
        "tp", _count(1, 64), "tensor-parallel ranks of each worker, each with a part of the model (default: 1)", "N"
    ),
    Setting("prefill_tp", _count(1, 64), "ranks of each prefill worker, if they differ (default: --tp)", "N"),
    Setting(
        "prefill_block_tokens",
        _block_tokens,
        "tokens of one KV block of prefill workers (default: --block-tokens)",
        "N",
    ),
    Setting(
        "prefill_dtype",
        _one_of("bfloat16", "float32"),
        "bfloat16 or float32, of prefill workers (default: --dtype)",
        "DTYPE",
    ),
    Setting("max_model_len", _count(16), "tokens of prompt and answer together (default: what the model allows)", "N"),
    Setting("kv_memory", parse_size, "KV cache of each worker, e.g. 512MiB (default: from what is free)", "SIZE"),
    Setting(
        "swap_memory", parse_size, "host memory for KV of preempted sequences, e.g. 2GiB (default: a tenth)", "SIZE"
    ),
    Setting("max_batch", _count(1, 4096), "sequences a worker runs at once (default: 32)", "N"),
    Setting("step_tokens", _count(16, 65536), "tokens of one step, prompts' among them (default: 512)", "N"),
    Setting("policy", _one_of(*POLICIES), f"who goes first: {', '.join(POLICIES)} (default: {DEFAULT_POLICY})", "NAME"),
    Setting("block_tokens", _block_tokens, "tokens of one KV block, a multiple of 16 (default: 16)", "N"),
    Setting(
        "transport",
        _one_of(*TRANSPORTS),
        "what carries KV between workers: auto (mapped where possible), mapped or ray_store",
        "NAME",
    ),
    Setting("kv_checksums", _switch, "on or off: check KV that came from another worker (default: on)", "ON|OFF"),
    Setting(
        "dtype",
        _one_of("auto", "bfloat16", "float32"),
        "auto (the model's; float32 on a CPU without bfloat16), bfloat16 or float32",
        "DTYPE",
    ),
    Setting("device", _one_of("auto", "cpu", "cuda"), "auto (GPUs if there are any), cpu or cuda", "DEVICE"),
    Setting(
        "deterministic",
        _switch,
        "on or off: the same logits to the last bit, whatever else runs; slower, on a CPU much (default: off)",
        "ON|OFF",
    ),
    Setting("threads", _count(1, 256), "CPU threads of each rank (default: 1)", "N"),
    Setting("host", parse_text, "address to listen on (default: 127.0.0.1; 0.0.0.0 lets others in)", "HOST"),
    Setting("grpc_port", parse_port, "port of the gRPC API (default: 50051)", "PORT"),
    Setting("http_port", parse_port, "port of the OpenAI-style HTTP API (default: 8000)", "PORT"),
    Setting("metrics_port", parse_port, "port of the router's Prometheus metrics (default: 9400)", "PORT"),
    Setting("redis_url", parse_text, "a Redis to use (default: a private one is started)", "URL"),
    Setting("cluster_name", parse_text, "keeps clusters that share a Redis apart (default: baton)", "NAME"),
    Setting("api_keys_file", parse_text, "file with one API key per line; or set BATON_API_KEYS=key1,key2", "FILE"),
    Setting("api_keys", _keys, "API keys, with commas between them", secret=True),
    Setting("cluster_token", parse_text, "token between the services (default: made at start)", secret=True),
    Setting("tls_cert", parse_text, "PEM certificate chain of the APIs; needs --tls-key", "FILE"),
    Setting("tls_key", parse_text, "PEM private key of the APIs; needs --tls-cert", "FILE"),
    Setting("otlp_endpoint", parse_text, "OpenTelemetry collector (OTLP over gRPC), e.g. http://localhost:4317", "URL"),
    Setting("log_format", _one_of("console", "json"), "console or json (default: console)", "FORMAT"),
    Setting("log_level", _one_of("debug", "info", "warning", "error"), "debug, info, warning or error", "LEVEL"),
    Setting("drain_s", _count(0, 3600), "seconds that Ctrl-C lets running requests finish (default: 10)", "S"),
    Setting("start_s", _count(5, 86400), "seconds the cluster may take to become ready (default: 300)", "S"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def load(flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None) -> ServeConfig:
    """Settle every setting. Flags that are None were not given. Raises ConfigError with one line of what to do."""
    values: dict[str, object] = {}
    if file is not None:
        values |= _from_file(file)
    values |= _from_environment(environment)
    for name, value in flags.items():
        if value is not None:
            setting = _BY_NAME[name]
            values[name] = setting.parse(setting.flag, value)
    if values.get("both"):  # a cluster of these alone is one flag
        values = {"prefill": 0, "decode": 0} | values
    config = ServeConfig(**values)  # type: ignore[arg-type]  # each value went through its setting's parser
    _check_together(config)
    return config


def find_file(flag: str | None, environment: Mapping[str, str], folder: Path) -> Path | None:
    """The file that --config or BATON_CONFIG names, else `baton.yaml` here, if there is one."""
    named = flag or environment.get("BATON_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"There is no configuration file {named}: mend --config or BATON_CONFIG.")
        return Path(named)
    default = folder / DEFAULT_FILE
    return default if default.is_file() else None


def read_api_keys(config: ServeConfig) -> tuple[str, ...]:
    """Keys of the environment and of the file; none means that anyone who reaches the port may call."""
    keys = list(config.api_keys)
    if config.api_keys_file is not None:
        try:
            lines = Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys-file {config.api_keys_file} can't be read: {_reason(error)}.") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"--api-keys-file {config.api_keys_file} holds no key: write one on each line.")
        keys += found
    return tuple(dict.fromkeys(keys))


def _from_file(file: Path) -> dict[str, object]:
    import yaml  # noqa: PLC0415  # only when there is a file: help stays fast

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} can't be read: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold lines such as `model: PATH`, not a {type(content).__name__}.")
    values = {}
    for key, value in content.items():
        setting = _BY_NAME.get(str(key).replace("-", "_"))
        if setting is None:
            raise ConfigError(f"{file} holds an unknown key {key!r}.{_suggest(str(key), _file_keys())}")
        if setting.secret:
            raise ConfigError(f"{file} must not hold {key!r}, a secret: set {setting.variable} instead.")
        if value is not None:
            values[setting.name] = setting.parse(f"{key} in {file}", value)
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    by_variable = {setting.variable: setting for setting in SETTINGS}
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in by_variable:
            hint = _suggest(variable, sorted(by_variable))
            raise ConfigError(f"The environment holds an unknown variable {variable}.{hint}")
        if text != "":
            values[by_variable[variable].name] = by_variable[variable].parse(variable, text)
    redis_url = environment.get("REDIS_URL")
    if redis_url and "redis_url" not in values:
        values["redis_url"] = redis_url
    return values


def _file_keys() -> list[str]:
    return sorted(setting.name for setting in SETTINGS if not setting.secret)


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = close_names(word, known)
    return f" Did you mean {close[0]}?" if close else f" Known are: {', '.join(known)}."


def close_names(word: str, known: Iterable[str]) -> list[str]:
    """Up to two of `known` that may have been meant, the closest first. What all share says nothing: it is left out."""
    bare = {_bare(name): name for name in known}
    return [bare[name] for name in difflib.get_close_matches(_bare(word), bare, n=2)]


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX).lstrip("-").replace("-", "_").lower()


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return (error.strerror or type(error).__name__).lower()


def _check_together(config: ServeConfig) -> None:
    if bool(config.prefill) != bool(config.decode):
        raise ConfigError(
            f"--prefill is {config.prefill} and --decode is {config.decode}: neither serves without the other."
        )
    if not config.num_workers:
        raise ConfigError("There would be no worker: give --prefill and --decode, or --both.")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError("TLS needs a certificate and a key: give both --tls-cert and --tls-key.")
    for name in ("tls_cert", "tls_key"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{_BY_NAME[name].flag} names {path}, which is no file.")
    ports = [config.grpc_port, config.http_port, config.metrics_port]
    if len(set(ports)) < len(ports):
        raise ConfigError("--grpc-port, --http-port and --metrics-port must differ.")


assert {one.name for one in fields(ServeConfig)} == set(_BY_NAME), "a field without a setting, or the reverse"
